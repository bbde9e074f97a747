package m3o

import (
	"fmt"
	"time"
)

// The least and the most a limit may be. A Go server needs 6 MB to start, and
// a thread for each CPU it uses beside five more.
const (
	MinMemory, MaxMemory = 8 << 20, 1 << 40
	MinCPU, MaxCPU       = 10, 1024 * 1000 // thousandths of a core
	MinPids, MaxPids     = 16, 1 << 20
	MinFiles, MaxFiles   = 16, 1 << 20
	MinGrace, MaxGrace   = time.Second, time.Hour
)

// Check says, as an Invalid error, which limit no program could run with, or
// is so high that it is surely a slip. Zero fields are left out.
func (l Limits) Check() error {
	for _, f := range []struct {
		what           string
		v, least, most int64
		low, high      string // the bounds as people write them
	}{
		{"memory", l.MemoryBytes, MinMemory, MaxMemory, "8MB", "1024GB"},
		{"CPU", l.CPUMillis, MinCPU, MaxCPU, "0.01 of a core", "1024 cores"},
		{"processes and threads", l.Pids, MinPids, MaxPids, "16", "1048576"},
		{"open files", l.Files, MinFiles, MaxFiles, "16", "1048576"},
		{"time to end", int64(l.Grace), int64(MinGrace), int64(MaxGrace), "1s", "1h"},
	} {
		if f.v == 0 || f.v >= f.least && f.v <= f.most {
			continue
		}
		word, why := "low", "no program starts with less than "+f.low
		if f.v > f.most {
			word, why = "high", f.high+" is the most"
		} else if f.what == "time to end" {
			why = f.low + " is the least"
		}
		return &Error{Kind: Invalid, Msg: "the limit of " + f.what + " is too " + word, Hint: fmt.Sprintf("%s; choose from %s to %s", why, f.low, f.high)}
	}
	return nil
}

// Doubts says which limits the machine, with so much memory and so many CPUs,
// cannot give, or gives to no effect.
func (l Limits) Doubts(memory int64, cpus int) []string {
	var out []string
	if memory > 0 && l.MemoryBytes > memory {
		out = append(out, fmt.Sprintf("it may use %d MB of memory, and this machine has %d MB: when it takes that much, the machine runs out first", l.MemoryBytes>>20, memory>>20))
	}
	if l.CPUMillis > int64(cpus)*1000 {
		out = append(out, fmt.Sprintf("it may use %g cores, and this machine has %d", float64(l.CPUMillis)/1000, cpus))
	}
	used := int64(cpus)
	if l.CPUMillis > 0 {
		used = min(used, (l.CPUMillis+999)/1000)
	}
	if least := used + 8; l.Pids > 0 && l.Pids < least {
		out = append(out, fmt.Sprintf("%d processes and threads are few for %d CPUs: a Go program needs about %d; raise pids or lower cpu", l.Pids, used, least))
	}
	return out
}
