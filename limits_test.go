package m3o

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestLimitsThatNoProgramRunsWithAreRefused(t *testing.T) {
	for _, c := range []struct {
		l         Limits
		msg, hint string // msg "": it is fine
	}{
		{Limits{}, "", ""},
		{Limits{MemoryBytes: 8 << 20, CPUMillis: 10, Pids: 16, Files: 16, Grace: time.Second}, "", ""},
		{Limits{MemoryBytes: 1 << 40, CPUMillis: 1024_000, Pids: 1 << 20, Files: 1 << 20, Grace: time.Hour}, "", ""},
		{Limits{MemoryBytes: 8<<20 - 1}, "memory is too low", "less than 8MB; choose from 8MB to 1024GB"},
		{Limits{MemoryBytes: -1}, "memory is too low", "8MB"},
		{Limits{MemoryBytes: math.MinInt64}, "memory is too low", "8MB"},
		{Limits{MemoryBytes: 1<<40 + 1}, "memory is too high", "1024GB is the most"},
		{Limits{CPUMillis: 9}, "CPU is too low", "0.01 of a core"},
		{Limits{CPUMillis: -500}, "CPU is too low", "0.01 of a core"},
		{Limits{CPUMillis: math.MaxInt64}, "CPU is too high", "1024 cores"},
		{Limits{Pids: 1}, "processes and threads is too low", "less than 16"},
		{Limits{Pids: 15}, "processes and threads is too low", "less than 16"},
		{Limits{Pids: -1}, "processes and threads is too low", "less than 16"},
		{Limits{Pids: 1<<20 + 1}, "processes and threads is too high", "1048576"},
		{Limits{Files: 3}, "open files is too low", "less than 16"},
		{Limits{Files: math.MaxInt64}, "open files is too high", "1048576"},
		{Limits{Grace: time.Millisecond}, "time to end is too low", "1s is the least"},
		{Limits{Grace: -time.Second}, "time to end is too low", "1s is the least"},
		{Limits{Grace: 2 * time.Hour}, "time to end is too high", "1h is the most"},
	} {
		err := c.l.Check()
		switch {
		case c.msg == "" && err != nil:
			t.Errorf("%+v: %v, want it to be fine", c.l, err)
		case c.msg != "" && (KindOf(err) != Invalid || !strings.Contains(err.Error(), c.msg) || !strings.Contains(HintOf(err), c.hint)):
			t.Errorf("%+v: %v (%s), want %q (%q)", c.l, err, HintOf(err), c.msg, c.hint)
		}
	}
}

func TestLimitsTheMachineCannotGive(t *testing.T) {
	for _, c := range []struct {
		l    Limits
		want []string // a part of each doubt
	}{
		{Limits{}, nil},
		{Limits{MemoryBytes: 4 << 30, CPUMillis: 2000, Pids: 16}, nil},
		{Limits{MemoryBytes: 4<<30 + 1}, []string{"this machine has 4096 MB"}},
		{Limits{CPUMillis: 64_500}, []string{"64.5 cores, and this machine has 16"}},
		{Limits{Pids: 16}, []string{"few for 16 CPUs: a Go program needs about 24"}},
		{Limits{Pids: 16, CPUMillis: 500}, nil},
		{Limits{MemoryBytes: 1 << 40, CPUMillis: 1024_000, Pids: 20}, []string{"memory", "cores", "pids"}},
	} {
		got := c.l.Doubts(4<<30, 16)
		if len(got) != len(c.want) {
			t.Errorf("%+v: %q, want %d", c.l, got, len(c.want))
			continue
		}
		for i := range got {
			if !strings.Contains(got[i], c.want[i]) {
				t.Errorf("%+v: %q, want %q", c.l, got[i], c.want[i])
			}
		}
	}
}
