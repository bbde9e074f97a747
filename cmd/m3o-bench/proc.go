//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A process is one that ran when processes looked.
type process struct {
	pid, parent int
	args        []string
	cpu         time.Duration // user and system, its own and of the children it has waited for
}

// program is the base name of what runs.
func (p process) program() string {
	if len(p.args) == 0 {
		return ""
	}
	return filepath.Base(p.args[0])
}

// names says whether an argument has a path below dir, or dir itself.
func (p process) names(dir string) bool {
	for _, a := range p.args {
		if strings.Contains(a+"/", dir+"/") {
			return true
		}
	}
	return false
}

// processes lists the machine's processes. Kernel threads and zombies, which
// have ended and whose parent has not asked yet, are there without arguments.
func processes() ([]process, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var ps []process
	for _, s := range stats {
		p, err := readProcess(filepath.Dir(s))
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		ps = append(ps, p)
	}
	return ps, nil
}

// gone says whether err means that a process ended while it was looked at.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

func readProcess(dir string) (process, error) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return process{}, err
	}
	p, err := parseStat(stat)
	if err != nil {
		return p, fmt.Errorf("%s/stat: %w", dir, err)
	}
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if s := strings.TrimRight(string(cmdline), "\x00"); s != "" {
		p.args = strings.Split(s, "\x00")
	}
	return p, err
}

// tick is the unit of the times in /proc/PID/stat: USER_HZ is 100 wherever Go runs.
const tick = 10 * time.Millisecond

// parseStat reads /proc/PID/stat, proc(5). The program's name may have spaces
// and brackets in it, so fields count from the last bracket.
func parseStat(b []byte) (process, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return process{}, errors.New("no name in brackets")
	}
	f := strings.Fields(string(b[end+1:]))
	const state, ppid, utime, cstime = 3, 4, 14, 17 // as proc(5) counts
	if len(f) <= cstime-state {
		return process{}, fmt.Errorf("%d fields after the name", len(f))
	}
	var p process
	var err error
	if p.pid, err = strconv.Atoi(strings.TrimSpace(string(b[:open]))); err != nil {
		return p, err
	}
	if p.parent, err = strconv.Atoi(f[ppid-state]); err != nil {
		return p, err
	}
	for i := utime; i <= cstime; i++ {
		n, err := strconv.ParseInt(f[i-state], 10, 64)
		if err != nil {
			return p, err
		}
		p.cpu += time.Duration(n) * tick
	}
	return p, nil
}

// memory is what a process, or several, keep resident, in bytes. PSS counts a
// page that n processes share as a n-th; its anonymous part is no file's.
type memory struct{ rss, pss, anon int64 }

func (m memory) plus(o memory) memory { return memory{m.rss + o.rss, m.pss + o.pss, m.anon + o.anon} }

// memoryOf sums up the memory of processes; one that has ended counts nothing.
func memoryOf(ps ...process) (memory, error) {
	var sum memory
	for _, p := range ps {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.pid))
		if gone(err) {
			continue
		}
		if err != nil {
			return sum, err
		}
		m, err := parseRollup(b)
		if err != nil {
			return sum, fmt.Errorf("smaps_rollup of %d: %w", p.pid, err)
		}
		sum = sum.plus(m)
	}
	return sum, nil
}

// parseRollup reads /proc/PID/smaps_rollup.
func parseRollup(b []byte) (memory, error) {
	var m memory
	seen := map[string]bool{}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		var to *int64
		switch f[0] {
		case "Rss:":
			to = &m.rss
		case "Pss:":
			to = &m.pss
		case "Pss_Anon:":
			to = &m.anon
		default:
			continue
		}
		n, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return m, err
		}
		*to = n << 10
		seen[f[0]] = true
	}
	if len(seen) != 3 {
		return m, fmt.Errorf("found %d of Rss, Pss and Pss_Anon", len(seen))
	}
	return m, nil
}

// parts are the processes of a box by what they are.
type parts struct {
	daemon, router, buildkit []process
	shims, apps              []process
}

// parts finds the processes that run for the box.
func (b *box) parts() (parts, error) {
	ps, err := processes()
	if err != nil {
		return parts{}, err
	}
	return partsOf(ps, b.data, b.cmd.Process.Pid), nil
}

func partsOf(ps []process, data string, daemon int) parts {
	var found parts
	shim := map[int]bool{}
	for _, p := range ps {
		switch {
		case p.pid == daemon:
			found.daemon = append(found.daemon, p)
		case !p.names(data):
		case p.program() == "m3od" && len(p.args) > 1 && p.args[1] == "router":
			found.router = append(found.router, p)
		case p.program() == "buildkitd":
			found.buildkit = append(found.buildkit, p)
		case p.program() == "m3o-shim":
			found.shims = append(found.shims, p)
			shim[p.pid] = true
		}
	}
	for _, p := range ps {
		if shim[p.parent] && p.program() != "" && p.program() != "runc" {
			found.apps = append(found.apps, p)
		}
	}
	return found
}

// A usage is the CPU time of a box's parts. Children count once they have been
// waited for, which git's and a build's processes are.
type usage struct{ daemon, router, build time.Duration }

func (u usage) sum() time.Duration { return u.daemon + u.router + u.build }

func (u usage) minus(o usage) usage {
	return usage{u.daemon - o.daemon, u.router - o.router, u.build - o.build}
}

// cpu is what the box's parts have used since they started.
func (b *box) cpu() (usage, error) {
	p, err := b.parts()
	var u usage
	for _, part := range []struct {
		to *time.Duration
		ps []process
	}{{&u.daemon, p.daemon}, {&u.router, p.router}, {&u.build, p.buildkit}} {
		for _, p := range part.ps {
			*part.to += p.cpu
		}
	}
	return u, err
}
