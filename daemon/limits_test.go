package daemon

import (
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// Whatever the CLI checks, the API does: others call it too.
func TestScaleRefusesLimitsThatNoProgramRunsWith(t *testing.T) {
	for want, l := range map[string]*m3ov1.Limits{
		"processes and threads is too low":  {Pids: 1},
		"memory is too low":                 {MemoryBytes: 4 << 20},
		"CPU is too low":                    {CpuMillis: -1},
		"open files is too low":             {Files: 2},
		"memory is too high":                {MemoryBytes: 1 << 62},
		"processes and threads is too high": {Pids: 1 << 40},
	} {
		_, err := scaleAPI{&Daemon{}}.Set(t.Context(), connect.NewRequest(&m3ov1.SetScaleRequest{App: "hello",
			Changes: []*m3ov1.ScaleChange{{Process: "web", Limits: l}}}))
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "web: the limit of "+want) || !strings.Contains(m3o.HintOf(err), "choose from") {
			t.Errorf("%v: %v (%s), want %q", l, err, m3o.HintOf(err), want)
		}
	}
}
