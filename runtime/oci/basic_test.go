//go:build linux

package oci_test

import (
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/runtimetest"
)

func TestDriver(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Rig {
		r := newRig(t)
		breakRunc, mend := r.breakable(t)
		d, end := r.serve(t)
		t.Cleanup(func() {
			end()
			shutdown(t, d)
			if left := r.leftovers(t); len(left) > 0 {
				t.Errorf("left after Shutdown: %q", left)
			}
		})
		again := func(between func(*testing.T)) func(t *testing.T) runtime.Driver {
			return func(t *testing.T) runtime.Driver {
				end()
				between(t)
				d, end = r.serve(t)
				return d
			}
		}
		kill := func(file string) func(*testing.T, m3o.Instance) {
			return func(t *testing.T, in m3o.Instance) {
				t.Helper()
				if err := unix.Kill(pidOf(t, r, in.ID, file), unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
		}
		fail := func(reason, script string) func(*testing.T) (string, func()) {
			return func(t *testing.T) (string, func()) {
				breakRunc(t, script)
				return reason, mend
			}
		}
		return runtimetest.Rig{Driver: d, Image: r.image, Limits: true, OwnNet: true,
			Reopen:    again(func(*testing.T) {}),
			Leftovers: func(t *testing.T) []string { return r.leftovers(t) },
			Faults: runtimetest.Faults{
				Kill: map[string]func(*testing.T, m3o.Instance){"instance": kill("pid"), "shim": kill("shim.pid")},
				Launch: map[string]func(*testing.T) (string, func()){
					"create": fail("no room on the moon", complain("create")),
					"start":  fail("no room on the moon", complain("start")),
					// Its first process dies between create and start: there is no network to set up.
					"network": fail("", `"$R" "$@"; e=$?
[ $VERB = create ] && { pid=; for a; do [ "$pid" = --pid-file ] && kill -9 $(cat $a); pid=$a; done; }
exit $e`),
				},
				FullDisk: func(t *testing.T) func() { return runtimetest.FullDisk(t, filepath.Join(r.cfg.Dir, "logs")) },
				Reboot:   again(r.reboot),
			}}
	})
}

// complain is a script that fails a runc command as runc does, in its log.
func complain(verb string) string {
	return `[ $VERB = ` + verb + ` ] && { echo "no room on the moon" >&2; log=; for a; do [ "$log" = --log ] && echo "no room on the moon" >>$a; log=$a; done; exit 1; }
exec "$R" "$@"`
}
