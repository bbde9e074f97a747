//go:build linux

package oci

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o/runtime"
)

var _ runtime.Metered = (*handle)(nil)

// Usage is runtime.Metered's.
func (h *handle) Usage() (runtime.Usage, error) { return h.d.cgroups.usage(h.id) }

// usage reads an instance's control groups. What is in no file the machine has
// stays zero, but for memory: without it there is nothing to tell.
func (c cgroups) usage(id string) (runtime.Usage, error) {
	u := runtime.Usage{MemoryLimit: runtime.DefaultMemoryBytes}
	mem := c.memory(id)
	used, err := number(filepath.Join(mem, "memory.current"))
	if err != nil {
		if used, err = number(filepath.Join(mem, "memory.usage_in_bytes")); err != nil {
			return u, fmt.Errorf("measure %s: %w", id, err)
		}
	}
	if n, err := number(filepath.Join(mem, "memory.max")); err == nil {
		u.MemoryLimit = n
	} else if n, err := number(filepath.Join(mem, "memory.limit_in_bytes")); err == nil {
		u.MemoryLimit = n
	}
	stat := fields(filepath.Join(mem, "memory.stat"))
	u.MemoryBytes = max(0, used-cmp.Or(stat["total_inactive_file"], stat["inactive_file"]))
	u.OOMKills = cmp.Or(fields(filepath.Join(mem, "memory.events"))["oom_kill"], fields(filepath.Join(mem, "memory.oom_control"))["oom_kill"])
	if dir := c.group("cpuacct", id); dir != "" {
		if n, err := number(filepath.Join(dir, "cpuacct.usage")); err == nil {
			u.CPU = time.Duration(n)
		} else {
			u.CPU = time.Duration(fields(filepath.Join(dir, "cpu.stat"))["usage_usec"]) * time.Microsecond
		}
	}
	if dir := c.group("pids", id); dir != "" {
		u.Pids, _ = number(filepath.Join(dir, "pids.current"))
	}
	return u, nil
}

// group is the directory of an instance's group where a controller is.
func (c cgroups) group(controller, id string) string {
	for _, h := range c.hierarchies {
		if h.v2 && c.unified() || slices.Contains(h.controllers, controller) {
			return filepath.Join(h.dir, c.name, id)
		}
	}
	return ""
}

func number(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// fields reads a file of "name number" lines; what is no such line is left out.
func fields(path string) map[string]int64 {
	b, _ := os.ReadFile(path)
	return parseFields(b)
}

func parseFields(b []byte) map[string]int64 {
	out := map[string]int64{}
	for l := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(strings.TrimSpace(l), " ")
		if n, err := strconv.ParseInt(v, 10, 64); ok && err == nil {
			out[k] = n
		}
	}
	return out
}
