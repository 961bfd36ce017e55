"""Images over HTTP: checked before they are kept, and never trusted."""

import io
import random
import struct
import zlib

import httpx
import pytest
from PIL import Image

from .conftest import JOB, Service, inline, png


def sent(client: httpx.Client, content: bytes, name: str = "a.png") -> httpx.Response:
    return client.post("/v1/images", files={"file": (name, content)})


def encoded(kind: str, size: tuple[int, int] = (30, 20)) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(file, kind)
    return file.getvalue()


def test_an_image_is_kept_once_and_served_as_it_was_sent(client: httpx.Client) -> None:
    content = png(seed=11)
    response = sent(client, content, "three.png")
    image = response.json()
    assert response.status_code == 201
    assert image["size"] == len(content) and (image["width"], image["height"]) == (28, 28)
    assert image["media_type"] == "image/png" and image["name"] == "three.png"
    again = sent(client, content, "other.png")
    assert again.status_code == 200 and again.json() == image
    served = client.get(image["url"])
    assert served.content == content and served.headers["content-type"] == "image/png"
    assert served.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in served.headers["cache-control"]
    etag = served.headers["etag"]
    known = client.get(image["url"], headers={"If-None-Match": f'"x", W/{etag}'})
    assert known.status_code == 304 and not known.content and known.headers["etag"] == etag
    assert client.get(image["url"], headers={"If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    "kind, media_type",
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("WEBP", "image/webp"),
        ("BMP", "image/bmp"),
        ("GIF", "image/gif"),
    ],
)
def test_the_media_type_is_what_the_bytes_are(
    client: httpx.Client, kind: str, media_type: str
) -> None:
    image = sent(client, encoded(kind), "a.html").json()
    assert image["media_type"] == media_type and (image["width"], image["height"]) == (30, 20)


def bomb() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def broken() -> dict[str, bytes]:
    chance = random.Random(0)
    found = {"bomb": bomb(), "empty": b"", "text": b"hello", "svg": b"<svg/>", "pdf": b"%PDF-1.4"}
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        whole = encoded(kind)
        for i in range(9):
            found[f"{kind}-{i}"] = whole[: chance.randrange(1, len(whole) * 3 // 4)]
    return found


@pytest.mark.parametrize("content", broken().values(), ids=broken())
def test_broken_images_are_refused_in_words(client: httpx.Client, content: bytes) -> None:
    response = sent(client, content)
    assert response.status_code == 422, response.text
    assert response.json()["code"] == "invalid_image"
    # In a job it is no better.
    job = client.post("/v1/jobs", json=JOB | {"source": inline(content)})
    assert job.status_code == 422 and job.json()["code"] == "invalid_image"


def test_an_image_over_the_limit_is_refused(client: httpx.Client) -> None:
    content = png() + bytes(32 * 2**20)
    response = sent(client, content)
    assert response.status_code == 422 and "resize" in response.json()["detail"]
    response = client.post("/v1/jobs", json=JOB | {"source": inline(content)})
    assert response.status_code == 422 and "resize" in response.json()["detail"]


@pytest.mark.parametrize(
    "name, kept",
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("a\x00b\x1b[31m.png", "ab[31m.png"),
        ("\u202egnp.exe", "gnp.exe"),
        ("x" * 500, "x" * 200),
        ("/", "image"),
        ("日本 1.png", "日本 1.png"),
        ("a.png\r\nSet-Cookie: a=b", "a.pngSet-Cookie: a=b"),
        ('a"; filename=b.png', 'a"; filename=b.png'),
    ],
)
def test_names_are_short_printable_and_no_paths(
    service: Service, client: httpx.Client, name: str, kept: str
) -> None:
    # By hand, since clients escape what is dangerous.
    quoted = name.replace("\\", "\\\\").replace('"', '\\"').replace("\r\n", "%0D%0A")
    body = (
        f'--b\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n\r\n'
    ).encode() + png(seed=hash(name) % 10_000)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = client.post("/v1/images", content=body + b"\r\n--b--\r\n", headers=headers)
    if "\x00" in name and response.status_code == 400:
        return
    assert response.status_code == 201, response.text
    image = response.json()
    assert image["name"] in (kept, kept.replace("Set-Cookie", "%0D%0ASet-Cookie"))
    served = client.get(image["url"])
    assert served.status_code == 200
    assert "set-cookie" not in served.headers
    assert served.headers["content-disposition"].startswith("inline; filename*=UTF-8''")
    assert served.headers["content-disposition"].isascii()


@pytest.mark.parametrize(
    "files", [{"other": ("a.png", png())}, {"file": (None, "text")}], ids=["other", "text"]
)
def test_other_forms_are_refused(client: httpx.Client, files: dict[str, tuple[str, bytes]]) -> None:
    response = client.post("/v1/images", files=files)
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_unknown_images_are_not_there(client: httpx.Client) -> None:
    assert client.get(f"/v1/images/{'0' * 64}").json()["code"] == "no_such_image"
    assert client.get("/v1/images/x").status_code == 422
    assert client.get(f"/v1/images/{'A' * 64}").status_code == 422
