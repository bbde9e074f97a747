//go:build linux

package oci

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups are the driver's control groups: a directory called after it at the
// root of every hierarchy, with one group an instance (made by runc) and one
// for its shim, so that neither is in the daemon's own group: whoever kills
// that (systemd does, on stop) must not kill the apps.
type cgroups struct {
	name        string
	hierarchies []hierarchy
}

type hierarchy struct {
	dir         string // where it is mounted
	v2          bool
	controllers []string // v1: what it controls, "name=systemd" included
}

// findCgroups reads the mounted hierarchies from a mountinfo file.
func findCgroups(name, mountinfo string) (cgroups, error) {
	b, err := os.ReadFile(mountinfo)
	if err != nil {
		return cgroups{}, fmt.Errorf("find cgroups: %w", err)
	}
	c := cgroups{name, parseHierarchies(b)}
	if len(c.hierarchies) == 0 {
		return cgroups{}, errors.New("no cgroup hierarchy is mounted")
	}
	return c, nil
}

func parseHierarchies(mountinfo []byte) (all []hierarchy) {
	for l := range strings.Lines(string(mountinfo)) {
		// "36 35 98:0 /root /point opts - type source super-opts", see proc(5).
		before, after, ok := strings.Cut(l, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		switch right[0] {
		case "cgroup2":
			all = append(all, hierarchy{dir: left[4], v2: true})
		case "cgroup":
			all = append(all, hierarchy{dir: left[4], controllers: strings.Split(right[2], ",")})
		}
	}
	return all
}

// unified is whether there is v2 alone.
func (c cgroups) unified() bool { return len(c.hierarchies) == 1 && c.hierarchies[0].v2 }

// path is what the OCI spec calls an instance's group.
func (c cgroups) path(id string) string { return "/" + c.name + "/" + id }

// setup makes what runc does not: on v2 the controllers must be handed down.
func (c cgroups) setup() error {
	if !c.unified() {
		return nil
	}
	root := c.hierarchies[0].dir
	if err := os.MkdirAll(filepath.Join(root, c.name), 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	for _, dir := range []string{root, filepath.Join(root, c.name)} {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +memory +pids"), 0); err != nil {
			return fmt.Errorf("enable cgroup controllers in %s: %w", dir, err)
		}
	}
	return nil
}

func (c cgroups) has(controller string) bool {
	for _, h := range c.hierarchies {
		if slices.Contains(h.controllers, controller) {
			return true
		}
		if h.v2 && c.unified() {
			b, _ := os.ReadFile(filepath.Join(h.dir, "cgroup.controllers"))
			return slices.Contains(strings.Fields(string(b)), controller)
		}
	}
	return false
}

// memory is where the kernel counts the out-of-memory kills of an instance.
func (c cgroups) memory(id string) string {
	for _, h := range c.hierarchies {
		if h.v2 && c.unified() || slices.Contains(h.controllers, "memory") {
			return filepath.Join(h.dir, c.name, id)
		}
	}
	return ""
}

// shim makes the groups of an instance's shim and returns their directories:
// in the hierarchies that somebody kills by, counts memory in or divides the
// CPU by: what an app's log costs to write is not taken from the daemon. A
// process can be born into a group of cgroup v2, "" where there is none; the
// others it has to join, which costs milliseconds, so they are not all.
func (c cgroups) shim(id string) (born string, others []string, err error) {
	for _, h := range c.hierarchies {
		if h.v2 || slices.ContainsFunc(h.controllers, func(c string) bool { return c == "memory" || c == "cpu" || c == "name=systemd" }) {
			dir := filepath.Join(h.dir, c.name, shimGroup(id))
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return "", nil, fmt.Errorf("make cgroup: %w", err)
			}
			if h.v2 {
				born = dir
			} else {
				others = append(others, dir)
			}
		}
	}
	return born, others, nil
}

func shimGroup(id string) string { return id + ".shim" }

func (c cgroups) dirs(groups ...string) []string {
	var out []string
	for _, h := range c.hierarchies {
		for _, g := range groups {
			out = append(out, filepath.Join(h.dir, c.name, g))
		}
	}
	return out
}

// list is every instance that has a group, its own or its shim's.
func (c cgroups) list() []string {
	var ids []string
	for _, h := range c.hierarchies {
		es, _ := os.ReadDir(filepath.Join(h.dir, c.name)) // none: nothing ran
		for _, e := range es {
			if e.IsDir() {
				ids = append(ids, strings.TrimSuffix(e.Name(), ".shim"))
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// kill ends every process of an instance and its shim, and waits for that.
func (c cgroups) kill(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		left := 0
		// The shim first, or it might begin something new.
		for _, dir := range c.dirs(shimGroup(id), id) {
			b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				continue // gone, or never was
			}
			for f := range strings.FieldsSeq(string(b)) {
				left++
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d processes of %s do not die", left, id)
		case <-time.After(wait):
		}
	}
}

// remove removes the empty groups of an instance and its shim.
func (c cgroups) remove(id string) error {
	for _, dir := range c.dirs(id, shimGroup(id)) {
		if err := rmdir(dir); err != nil {
			return err
		}
	}
	return nil
}

// removeAll removes the driver's own directories.
func (c cgroups) removeAll() error {
	for _, h := range c.hierarchies {
		if err := rmdir(filepath.Join(h.dir, c.name)); err != nil {
			return err
		}
	}
	return nil
}

// rmdir waits a little for the kernel to notice that the last process is gone.
func rmdir(dir string) error {
	for wait := time.Millisecond; ; wait *= 2 {
		err := os.Remove(dir)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		case errors.Is(err, unix.EBUSY) && wait < 2*time.Second:
			time.Sleep(wait)
		default:
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
}
