#!/usr/bin/env bash
# install.sh - what the scripts beside this one start: PostgreSQL, PgBouncer, MariaDB with Galera.
#
# Installs only what is missing, and only where that can be done without asking: as root, with
# apt. Elsewhere it says what to install, and the tests that need it are skipped.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
ls /usr/lib/postgresql/*/bin/initdb /usr/pgsql-*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || missing+=(postgresql)
command -v pgbouncer >/dev/null || missing+=(pgbouncer)
command -v mariadbd >/dev/null || missing+=(mariadb-server)
[ -e /usr/lib/galera/libgalera_smm.so ] || [ -e /usr/lib64/galera-4/libgalera_smm.so ] || missing+=(galera-4)
command -v rsync >/dev/null || missing+=(rsync)
command -v lsof >/dev/null || missing+=(lsof)
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "install.sh: not installed here: ${missing[*]} (their tests are skipped)" >&2
  exit 0
fi
# No service is started by the installation: the tests start their own, on other ports.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
