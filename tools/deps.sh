#!/usr/bin/env bash
# Installs what building and testing m3o needs and this machine lacks.
# Prints nothing when all is there. Debian and Ubuntu; elsewhere it says what is missing.
set -euo pipefail

missing=()
want() { command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
want git git
want ssh openssh-client
want git-lfs git-lfs # its pre-push hook is answered, and that is tested
want sshd openssh-server # the reference of the push benchmark
want gcc gcc
want pkg-config pkg-config
want protoc protobuf-compiler
[ -e /usr/include/google/protobuf/timestamp.proto ] || missing+=(libprotobuf-dev) # the imports of api/
want curl curl
want npm npm # webhook payloads to test with
want chromium chromium # a page calls a deployed service
want ip iproute2
want nft nftables # what other firewalls do is tested
want iptables iptables
want certutil libnss3-tools # m3o trust writes browsers' stores
if [ "${1:-}" = bench ]; then # the reference and the load of the router's benchmark
  want nginx nginx
  want wrk wrk
  want h2load nghttp2-client
  # Not every distribution's release has it; the benchmark then does without and says so.
  if ! command -v caddy >/dev/null 2>&1 && apt-cache show caddy >/dev/null 2>&1; then
    missing+=(caddy)
  fi
fi
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
pkg-config --exists libseccomp 2>/dev/null || missing+=(libseccomp-dev)
# runc is linked statically: libc and libseccomp as archives come with their -dev packages.
[ -n "$(find /usr/lib -name libc.a -print -quit 2>/dev/null)" ] || missing+=(libc6-dev)

if ! command -v go >/dev/null 2>&1; then
  echo "make deps: go is not installed; install Go 1.26 or newer and put it on PATH" >&2
  exit 1
fi
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null 2>&1; then
  echo "make deps: please install: ${missing[*]} (named as Debian names them)" >&2
  exit 1
fi
sudo=""
if [ "$(id -u)" -ne 0 ]; then
  sudo="sudo"
fi
echo "make deps: installing ${missing[*]}" >&2
# A service must not start because a package brought one along.
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
made=""
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null && $sudo chmod +x $policy && made=yes
fi
cleanup() { [ -z "$made" ] || $sudo rm -f $policy; }
trap cleanup EXIT
log=$(mktemp)
if ! { $sudo apt-get update -q && $sudo apt-get install -q -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -20 "$log" >&2
  echo "make deps: apt-get could not install ${missing[*]}; the last lines above say why" >&2
  exit 1
fi
rm -f "$log"
