#!/bin/sh
# Makes the secrets that docker-compose.yml reads, in ./secrets or the folder named. Those that
# exist are kept: Postgres remembers the password that its volume was made with.
set -eu
cd "$(dirname "$0")/.."
folder=${1:-secrets}

# The folder is closed, the files in it are not: containers read them as users of their own.
umask 077
mkdir -p "$folder"
umask 222

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

cd "$folder"
[ -s polycollide_database_password ] || random >polycollide_database_password
if ! [ -s polycollide_redis_url ] || ! [ -s redis.conf ]; then
    rm -f polycollide_redis_url redis.conf
    password=$(random)
    echo "redis://:$password@redis:6379/0" >polycollide_redis_url
    echo "requirepass $password" >redis.conf
fi
