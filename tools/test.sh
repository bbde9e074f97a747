#!/usr/bin/env bash
# Every test with the race detector, in two passes: what is light in parallel,
# then what runs containers and builds one package at a time, so that two
# cores are enough. No pipefail: head may leave before who feeds it. Prints the slowest packages and how many tests skipped.
# At most three failed tests are run again, each twice and alone on the machine. Those that pass are called unsteady at
# the end, in so many words: they are to be mended, but a whole run is not lost by them. Races and panics are not forgiven.
#   tools/test.sh [package pattern...]
set -eu
cd "$(dirname "$0")/.."
heavy='/(buildpacks/build|runtime/oci|cmd/m3od)$'
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mapfile -t all < <(go list "${@:-./...}")
light=() slow=()
for p in "${all[@]}"; do
  if [[ $p =~ $heavy ]]; then slow+=("$p"); else light+=("$p"); fi
done
failed=0
# again prints "package TestA|TestB" for what failed in $out/*, nothing when
# something failed that is no single test.
again() {
  cat "$out"/* | awk '
    /^--- FAIL: / { t = t (t == "" ? "" : "|") $3; n++ }
    /DATA RACE/ { hard = 1 }
    /^FAIL$/ { whole = 1 } # not printed by one that died of a panic or of its time-out
    /^FAIL\t/ { if (t == "" || !whole) hard = 1; else out = out $2 " " t "\n"; t = ""; whole = 0 }
    /^ok  / { t = ""; whole = 0 }
    END { if (!hard && n > 0 && n <= 3) printf "%s", out }'
}
run() { # name, flags…
  local name=$1
  shift
  go test -race -shuffle=on -v "$@" >"$out/$name" 2>&1 || failed=1
  grep -E '^(--- FAIL|FAIL|panic:|ok  |\?   )|DATA RACE' "$out/$name" | grep -v 'no test files' || true
}
[ ${#light[@]} -eq 0 ] || run light -p 2 -timeout 15m "${light[@]}"
[ ${#slow[@]} -eq 0 ] || run slow -p 1 -timeout 40m "${slow[@]}"

if [ $failed -ne 0 ]; then
  echo
  echo "== What failed"
  # The lines of each failed test, not the megabytes of the others.
  for f in "$out"/*; do
    grep -nE '^ *--- FAIL|^FAIL|panic:|DATA RACE' "$f" | head -40
    awk '/^=== RUN/ {buf=""} {buf=buf $0 "\n"} /^ *--- FAIL/ {printf "%s", substr(buf, length(buf) > 6000 ? length(buf)-6000 : 1); buf=""} /^ *--- (PASS|SKIP)/ {buf=""}' "$f" | tail -n 300
    grep -A60 -m1 -E 'panic:|DATA RACE' "$f" || true
  done
fi
unsteady=""
if [ $failed -ne 0 ] && todo=$(again) && [ -n "$todo" ]; then
  failed=0
  while read -r pkg tests; do
    if go test -race -count=2 -timeout 15m -run "^($tests)\$" "$pkg"; then unsteady+=" ${tests//|/ }"; else failed=1; fi
  done <<<"$todo"
fi
echo
echo "== Slowest packages"
cat "$out"/* | grep -E '^ok ' | awk '{print $3, $2}' | sort -rn | head -8
skips=$(cat "$out"/* | grep -c -E '^ *--- SKIP' || true)
passed=$(cat "$out"/* | grep -c -E '^ *--- PASS' || true)
fails=$(cat "$out"/* | grep -c -E '^ *--- FAIL' || true)
if [ "$skips" -gt 0 ]; then
  echo "== Skipped"
  cat "$out"/* | grep -A2 -E '^ *--- SKIP' | head -40
  if [ -n "${M3O_NEED:-}" ]; then
    echo "test: $skips tests skipped, and M3O_NEED=$M3O_NEED says none may" >&2
    failed=1
  fi
fi
[ $failed -eq 0 ] || { [ "$fails" -gt 0 ] || fails=1; }
if [ $failed -eq 0 ] && [ -n "$unsteady" ]; then
  fails=0
  echo "== Unsteady, failed once and passed twice alone:$unsteady"
fi
echo "$passed passed, $fails failed, $skips skipped"
exit $failed
