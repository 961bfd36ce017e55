"""What Alembic runs: migrations on the database that the settings name, or that the caller does."""

from alembic import context
from sqlalchemy import create_engine

from store.settings import settings
from store.tables import Base

url = context.config.attributes.get("url") or settings().direct_sqlalchemy_url
engine = create_engine(url)
with engine.connect() as connection:
    context.configure(connection, target_metadata=Base.metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
