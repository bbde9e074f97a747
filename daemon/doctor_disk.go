package daemon

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// Free space below which builds, and above which nothing, is likely to fail.
const (
	lowDisk  = 1 << 30
	someDisk = 10 << 30
)

// fileSystems are those that the state directory should not be on.
var fileSystems = map[int64]struct{ state, name, breaks string }{
	unix.OVERLAYFS_SUPER_MAGIC: {CheckFail, "an overlay", "images cannot be mounted on one, so no app starts"},
	unix.RAMFS_MAGIC:           {CheckWarn, "in memory", "everything is gone when the server restarts"},
	unix.TMPFS_MAGIC:           {CheckWarn, "in memory", "everything is gone when the server restarts"},
	unix.NFS_SUPER_MAGIC:       {CheckFail, "on a network", "images cannot be mounted there, and records may be lost"},
	unix.CIFS_SUPER_MAGIC:      {CheckFail, "on a network", "images cannot be mounted there, and records may be lost"},
	unix.SMB2_SUPER_MAGIC:      {CheckFail, "on a network", "images cannot be mounted there, and records may be lost"},
	unix.V9FS_MAGIC:            {CheckFail, "on a network", "images cannot be mounted there, and records may be lost"},
	unix.FUSE_SUPER_MAGIC:      {CheckWarn, "a program's (FUSE)", "images may not be mountable there"},
}

func (e exam) disk(_ context.Context, f *findings) {
	dir := e.cfg.Data
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		f.add(CheckFail, "disk", "choose another directory with --data", "the disk of %s cannot be asked: %v", e.cfg.Data, err)
		return
	}
	const move = "choose a directory on a local disk (ext4, xfs, btrfs) with --data"
	if k, ok := fileSystems[int64(st.Type)]; ok {
		f.add(k.state, "disk", move, "the file system of %s is %s: %s", dir, k.name, k.breaks)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		f.add(CheckFail, "disk", "mount -o remount,rw, once dmesg says that the disk is well; or "+move, "%s cannot be written (mounted read-only): m3od does not start", dir)
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		f.add(CheckFail, "disk", "mount -o remount,exec, and take noexec out of /etc/fstab; or "+move, "programs cannot be run from %s (mounted noexec): git's hooks, so every push, and what apps keep in volumes", dir)
	}
	free := int64(st.Bavail) * st.Bsize
	const hint = "destroy apps that are not needed (m3o keeps the images of releases that a rollback offers), lower --build-cache, or put --data on a larger disk"
	switch {
	case free < lowDisk:
		f.add(CheckFail, "disk", hint, "%d MB are free at %s: builds will fail, and soon every change", free>>20, dir)
	case free < someDisk:
		f.add(CheckWarn, "disk", hint, "%d MB are free at %s: a few builds use that up", free>>20, dir)
	default:
		f.add(CheckOK, "disk", "", "%d GB are free at %s", free>>30, dir)
	}
	if st.Files > 0 && st.Ffree < max(st.Files/50, 1000) {
		f.add(CheckFail, "disk", "find what has very many small files (du --inodes -x / | sort -n | tail); "+hint, "only %d of %d files more can be made at %s: builds and pushes fail though space is free", st.Ffree, st.Files, dir)
	}
}

// state looks at what the state directory must keep: keys above all.
func (e exam) state(_ context.Context, f *findings) {
	if _, err := os.Stat(e.cfg.path("keys")); errors.Is(err, fs.ErrNotExist) {
		return // nothing has run here yet
	}
	bad := len(*f)
	for path, without := range map[string]string{
		e.cfg.path("keys", "config.key"):       "the config of apps cannot be opened, and m3od would make another key",
		e.cfg.path("keys", "ssh_host_ed25519"): "SSH clients will refuse the server as another one",
	} {
		fi, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			f.add(CheckFail, "state", "put it back from a backup before m3od starts again", "%s is missing: %s", path, without)
			continue
		case err != nil:
			f.add(CheckFail, "state", "run this as root", "%s cannot be read: %v", path, err)
			continue
		}
		if fi.Mode().Perm()&0o077 != 0 {
			f.add(CheckFail, "state", "chmod 600 "+path, "%s can be read by other users of the server (%v): who reads it can be m3o", path, fi.Mode().Perm())
		}
		if filepath.Base(path) != "ssh_host_ed25519" {
			continue
		}
		if b, err := os.ReadFile(path); err != nil {
			f.add(CheckFail, "state", "run this as root", "%s cannot be read: %v", path, err)
		} else if _, err := ssh.ParsePrivateKey(b); err != nil {
			f.add(CheckFail, "state", "put it back from a backup; or remove it, and m3od makes another that clients must accept anew", "the git server's host key %s is damaged: m3od does not start", path)
		}
	}
	if len(*f) == bad {
		f.add(CheckOK, "state", "", "the keys in %s are there and closed to others", e.cfg.path("keys"))
	}
}
