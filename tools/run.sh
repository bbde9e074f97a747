#!/usr/bin/env bash
# Starts m3o in this directory's .m3o and, on a first start, signs in, pushes
# the sample service with real git over SSH and prints its answers. Stays in
# the foreground; Ctrl-C stops everything it started.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" -ne 0 ]; then
  # Builds and containers take namespaces and mounts.
  command -v sudo >/dev/null || { echo "make run: m3o needs root to build and to run containers; run it as root" >&2; exit 1; }
  exec sudo --preserve-env=PATH,GOPROXY,M3O_DATA "$PWD/tools/run.sh" "$@"
fi
root=$PWD
state=${M3O_DATA:-$root/.m3o}
export M3O_DATA=$state M3O_STOP_APPS=true
first=no
[ -e "$state/.sample" ] || first=yes
mkdir -p "$state"
log=$state/m3od.log
out=$state/m3od.out
: >"$out"

bin/m3od "$@" >"$out" 2>"$log" &
pid=$!
stop() {
  trap - INT TERM
  kill -TERM $pid 2>/dev/null || true
  wait $pid && code=0 || code=$?
  if [ "$code" -ne 0 ]; then
    tail -n 5 "$log" >&2
  fi
  exit "$code"
}
trap stop INT TERM

until grep -q '^ready ' "$out"; do
  if ! kill -0 $pid 2>/dev/null; then
    wait $pid && code=0 || code=$?
    grep -E '^m3od: ' "$log" >&2 || tail -n 20 "$log" >&2
    exit "$code"
  fi
  sleep 0.05
done

if [ $first = yes ]; then
  if ! M3O_FIRST_OUT=$out tools/sample.sh "$state"; then
    echo "make run: the sample did not work; the daemon's log is $log" >&2
    stop
  fi
  touch "$state/.sample"
else
  api=$(sed -n 's/^ready api=\([^ ]*\).*/\1/p' "$out")
  echo "m3o is ready at $api; the sample answers:"
  tools/sample.sh "$state" ask
fi
echo
echo "Log: $log   Stop: Ctrl-C"
wait $pid && code=0 || code=$?
grep -E '^m3od: ' "$log" >&2 || true
exit "$code"
