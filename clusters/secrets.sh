#!/usr/bin/env bash
# Makes what the cluster files read secrets from: a folder of files that only you can read. Prints no secret.
#
#   clusters/secrets.sh POSTGRES_HOST < file-with-its-password     # or type it: clusters/secrets.sh HOST, then Ctrl-D
#
# The folder is ~/refilled/secrets, or $REFILLED_SECRETS. What is there already is kept: delete a file to renew it.
#   token    Ray's, for every node and for whoever submits
#   pgpass   PostgreSQL's password, in libpq's own format (PGPASSFILE), so that no URL holds it
#   env      the URLs without passwords, MLflow's administrator and its key for signing
set -euo pipefail
umask 077

host=${1:?usage: clusters/secrets.sh POSTGRES_HOST < file-with-its-password}
folder=${REFILLED_SECRETS:-$HOME/refilled/secrets}
mkdir -p "$folder"
chmod 700 "$folder"

random_hex() { od -vAn -N32 -tx1 /dev/urandom | tr -d ' \n'; }

if [[ ! -e $folder/token ]]; then
  random_hex >"$folder/token"
fi
if [[ ! -e $folder/pgpass ]]; then
  password=$(tr -d '\n' | sed 's/[\\:]/\\&/g') # libpq wants a backslash before these two
  if [[ -z $password ]]; then
    echo "secrets: the password of PostgreSQL must come on standard input; got nothing." >&2
    exit 1
  fi
  printf '%s:5432:*:refilled:%s\n' "$host" "$password" >"$folder/pgpass"
fi
if [[ ! -e $folder/env ]]; then
  admin=$(random_hex)
  cat >"$folder/env" <<EOF
REFILLED_STUDIES='postgresql://refilled@$host:5432/studies?sslmode=require'
REFILLED_MLFLOW='postgresql://refilled@$host:5432/mlflow?sslmode=require'
MLFLOW_AUTH_ADMIN_USERNAME=refilled
MLFLOW_AUTH_ADMIN_PASSWORD=$admin
MLFLOW_TRACKING_USERNAME=refilled
MLFLOW_TRACKING_PASSWORD=$admin
MLFLOW_FLASK_SERVER_SECRET_KEY=$(random_hex)
EOF
fi
echo "Secrets are in $folder."
