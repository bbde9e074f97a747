// Package need says what a test needs of the machine. Where a need is absent
// the test is skipped, and fails instead where the environment variable
// M3O_NEED names that need or is "all": CI sets it, so nothing may skip there.
// Only tests import it.
package need

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func lack(t testing.TB, what, why string) {
	t.Helper()
	for n := range strings.SplitSeq(os.Getenv("M3O_NEED"), ",") {
		if n == what || n == "all" {
			t.Fatalf("need %s: %s (M3O_NEED says this machine has it; make deps installs it)", what, why)
		}
	}
	t.Skipf("need %s: %s", what, why)
}

// Root needs to run as root on Linux.
func Root(t testing.TB) {
	t.Helper()
	if goruntime.GOOS != "linux" || os.Geteuid() != 0 {
		lack(t, "root", "not root on Linux")
	}
}

// Program needs a program on PATH and returns its path.
func Program(t testing.TB, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	if err != nil {
		lack(t, name, err.Error())
	}
	return p
}

// Bin needs a binary that make build puts into the repository's bin
// directory (m3o-shim, runc, buildkitd …) and returns its absolute path.
func Bin(t testing.TB, name string) string {
	t.Helper()
	p := filepath.Join(RepoRoot(t), "bin", name)
	if fi, err := os.Stat(p); err != nil || fi.Mode()&0o111 == 0 {
		lack(t, "bin", "bin/"+name+" is not built; run make build")
	}
	return p
}

// Registry needs the Go module proxy: a build inside the test downloads modules.
func Registry(t testing.TB) {
	t.Helper()
	if slices.Contains([]string{"", "off"}, goEnv(t, "GOPROXY")) {
		lack(t, "registry", "GOPROXY is off")
	}
}

// RepoRoot is the directory of the project's go.mod.
func RepoRoot(t testing.TB) string {
	t.Helper()
	mod := goEnv(t, "GOMOD")
	if mod == "" || mod == os.DevNull {
		t.Fatal("not inside the module")
	}
	return filepath.Dir(mod)
}

func goEnv(t testing.TB, key string) string {
	t.Helper()
	out, err := exec.Command("go", "env", key).Output()
	if err != nil {
		t.Fatalf("go env %s: %v", key, err)
	}
	return strings.TrimSpace(string(out))
}

// Dir needs a directory that something outside Go installs: what names the
// need, and how says who makes it.
func Dir(t testing.TB, what, dir, how string) {
	t.Helper()
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
		lack(t, what, dir+" is not there; "+how)
	}
}

// Addrs are n addresses of this machine for servers that have to be told
// theirs, or to find it free again after a restart. Nobody listens there at
// the moment, and they are of ports that the kernel gives nobody on its own
// account: of those it gives, one that was closed a moment ago can be that of
// a connection somewhere now.
func Addrs(n int) ([]string, error) {
	first := 32768 // of those the kernel gives
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(b), &first)
	}
	from := 10000
	if first < from+1000 { // an unusual machine: better a small risk than no test
		from, first = 32768, 61000
	}
	var addrs []string
	for tries := 0; len(addrs) < n; tries++ {
		ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(from+rand.IntN(first-from))))
		if err != nil && tries < 1000 {
			continue // somebody listens there
		} else if err != nil {
			return nil, err
		}
		defer ln.Close() //nolint:errcheck // only when all are chosen, so that no two are the same
		addrs = append(addrs, ln.Addr().String())
	}
	return addrs, nil
}

// Nobody is an address of this machine that refuses connections until the
// test ends. The port of a listener that was closed would not do: a test
// beside this one can be given it.
func Nobody(t testing.TB) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(sa.(*unix.SockaddrInet4).Port))
}
