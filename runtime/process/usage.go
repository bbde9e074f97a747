//go:build unix

package process

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o/runtime"
)

var _ runtime.Metered = (*handle)(nil)

// ticks is the unit of times in /proc (USER_HZ), 100 a second on every
// machine that Go runs on.
const ticks = 100

// Usage is that of the first process alone, and known on Linux alone.
func (h *handle) Usage() (runtime.Usage, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.cmd.Process.Pid))
	if err != nil {
		return runtime.Usage{}, err
	}
	// "pid (name) state …": the name may hold anything. See proc_pid_stat(5);
	// fields count from 1 and the state is the third.
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	field := func(n int) int64 {
		if n-3 >= len(f) {
			return 0
		}
		v, _ := strconv.ParseInt(f[n-3], 10, 64)
		return v
	}
	return runtime.Usage{CPU: time.Duration(field(14)+field(15)) * time.Second / ticks,
		MemoryBytes: field(24) * int64(os.Getpagesize()), Pids: field(20)}, nil
}
