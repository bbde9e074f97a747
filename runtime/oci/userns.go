//go:build linux

package oci

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// NoUserNamespace says why instances with bundles below dir cannot have a user
// namespace of their own, "" when they can. Nothing is mapped on disk: images
// are read by everybody, and an app keeps its user id, so neither layers nor
// volumes need idmapped mounts.
func NoUserNamespace(dir string) string {
	if _, err := os.Stat("/proc/self/ns/user"); err != nil {
		return "the kernel has no user namespaces (CONFIG_USER_NS)"
	}
	b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if n, perr := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && perr == nil && n == 0 {
		return "user namespaces are turned off (sysctl user.max_user_namespaces)"
	}
	// The container is set up by its own root, which is nobody on the host.
	for ; ; dir = filepath.Dir(dir) {
		if fi, err := os.Stat(dir); err == nil && fi.Mode().Perm()&1 == 0 {
			return fmt.Sprintf("%s is closed to others (chmod o+x)", dir)
		}
		if dir == "/" || dir == "." {
			return ""
		}
	}
}

// userNamespace gives an instance one in which root is a user of the host that
// owns nothing and runs nothing else, and the app the user that it is.
func userNamespace(s *specs.Spec, root, app int) {
	m := []specs.LinuxIDMapping{{ContainerID: 0, HostID: uint32(root), Size: 1}, {ContainerID: uint32(app), HostID: uint32(app), Size: 1}}
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings, s.Linux.GIDMappings = m, m
}
