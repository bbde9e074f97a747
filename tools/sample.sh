#!/usr/bin/env bash
# The quickstart as a script: sign in, push the sample, ask it.
#   sample.sh STATE      on a first start
#   sample.sh STATE ask  only ask
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
state=$1
m3o=$root/bin/m3o
export XDG_CONFIG_HOME=$state/home HOME=$state/home
mkdir -p "$HOME"
key=$HOME/id_ed25519
work=$state/hello
api=$(sed -n 's/^ready api=\([^ ]*\).*/\1/p' "$state/m3od.out")
port=${api##*:}
url=https://hello.localhost:$port

ask() {
  echo "\$ curl --cacert $state/ca/ca.crt $url/helloworld.Greeter/Hello -d '{\"name\":\"Ada\"}'"
  curl -sS --fail-with-body --cacert "$state/ca/ca.crt" --resolve "hello.localhost:$port:127.0.0.1" \
    -H 'Content-Type: application/json' -d '{"name":"Ada"}' "$url/helloworld.Greeter/Hello"
  echo
  echo "\$ (the same over gRPC)"
  "$root/bin/tools/askgrpc" -ca "$state/ca/ca.crt" -addr "127.0.0.1:$port" -host hello.localhost -method /helloworld.Greeter/Hello -name Ada
}

if [ "${2:-}" = ask ]; then
  ask
  exit
fi

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || say() { printf '\n%s\n' "$*"; }

[ -e "$key" ] || ssh-keygen -q -t ed25519 -N '' -C sample -f "$key"
code=$(sed -n 's/.* --code \([^ ]*\).*/\1/p' "$state/m3od.out")
print=$(sed -n 's/.* --ca-fingerprint \([^ ]*\).*/\1/p' "$state/m3od.out")
if [ -n "$code" ]; then
  say "1. Sign in with an SSH key"
  echo "\$ m3o login $api"
  printf '%s' "$code" | "$m3o" login "$api" --code-stdin --key "$key" ${print:+--ca-fingerprint "$print"}
fi

say "2. Push a gRPC service"
if [ ! -d "$work/.git" ]; then
  rm -rf "$work"
  cp -r "$root/testdata/apps/hello-grpc" "$work"
  git -C "$work" init -q -b main
  git -C "$work" add .
  git -C "$work" -c user.name=m3o -c user.email=sample@localhost commit -q -m "Hello"
fi
cd "$work"
"$m3o" info -a hello >/dev/null 2>&1 || { echo "\$ m3o create hello"; "$m3o" create hello; }
echo "\$ git push m3o main"
export GIT_SSH_COMMAND="ssh -i $key -o IdentitiesOnly=yes -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=$HOME/known_hosts"
git push m3o main

say "3. Ask it, as JSON and as gRPC"
ask
say "It is yours: $url"
echo "Use the CLI as this sample does: XDG_CONFIG_HOME=$XDG_CONFIG_HOME bin/m3o apps"
