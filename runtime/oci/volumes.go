//go:build linux

package oci

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/m3o/m3o/runtime"
)

// mountPoints makes the directories that a workload mounts belong to its user,
// and a layer that has the places they are mounted at: the root file system
// is read-only, so runc cannot make them.
func mountPoints(dir string, mounts []runtime.Mount, uid int, lower string) (string, error) {
	top := filepath.Join(dir, "mounts")
	for _, m := range mounts {
		if err := os.MkdirAll(filepath.Join(top, m.Target), 0o755); err != nil {
			return "", fmt.Errorf("make mount point: %w", err)
		}
		if err := own(m.Source, uid); err != nil {
			return "", err
		}
	}
	return top + ":" + lower, nil
}

// own gives a directory and all in it to a user. An app keeps its user, so
// usually there is nothing to do but to look at the directory itself.
func own(dir string, uid int) error {
	fi, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("volume: %w", err)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) == uid {
		return nil
	}
	// The directory itself goes last: cut short, this is done again.
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		return os.Lchown(path, uid, uid)
	})
	if err == nil {
		err = os.Lchown(dir, uid, uid)
	}
	if err != nil {
		return fmt.Errorf("give volume to its app: %w", err)
	}
	return nil
}
