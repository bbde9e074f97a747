//go:build linux

package oci_test

import (
	"testing"

	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/runtimetest"
)

func TestDriver(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Rig {
		r := newRig(t)
		d, end := r.serve(t)
		t.Cleanup(func() {
			end()
			shutdown(t, d)
			if left := r.leftovers(t); len(left) > 0 {
				t.Errorf("left after Shutdown: %q", left)
			}
		})
		return runtimetest.Rig{Driver: d, Image: r.image, Limits: true, OwnNet: true,
			Reopen: func(t *testing.T) runtime.Driver {
				end()
				d, end = r.serve(t)
				return d
			},
			Leftovers: func(t *testing.T) []string { return r.leftovers(t) }}
	})
}
