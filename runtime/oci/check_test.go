//go:build linux

package oci

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o/internal/need"
)

// problems is what a check found, a line each.
func problems(all []Problem) string {
	var b strings.Builder
	for _, p := range all {
		b.WriteString(p.Msg + " | " + p.Hint + "\n")
	}
	return b.String()
}

// The tests of this package have a network namespace of their own.
func TestForwardsSetByOtherFirewalls(t *testing.T) {
	need.Root(t)
	nft, iptables := need.Program(t, "nft"), need.Program(t, "iptables")
	legacy := need.Program(t, "iptables-legacy")
	sh := func(script string) {
		t.Helper()
		cmd := exec.Command("sh", "-ec", script)
		cmd.Env = append(os.Environ(), "NFT="+nft, "IPT="+iptables, "OLD="+legacy)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	clean := func() {
		sh(`$NFT flush ruleset; $OLD -P FORWARD ACCEPT; $OLD -P INPUT ACCEPT; $OLD -F; $OLD -X`)
	}
	if err := exec.Command(legacy, "-L", "-n").Run(); err != nil {
		t.Logf("this kernel has no old iptables: %v", err)
		legacy = ":"
	}
	clean()
	t.Cleanup(clean)
	d := &Driver{cfg: Config{Name: "m3ot", Subnet: netip.MustParsePrefix("198.18.0.0/16")}, net: &network{prefix: "m3ot-"}}
	const firewalld = `$NFT -f - <<X
table inet firewalld {
	chain fwd_trusted {
		accept
	}
	chain zones {
		%s
	}
	chain filter_FORWARD {
		type filter hook forward priority 10; policy accept;
		ct state established accept
		jump zones
		ct state invalid drop
		reject with icmpx type admin-prohibited
	}
}
X`
	for _, c := range []struct {
		what, rules string
		want        []string // parts of the problems, none for no problem
	}{
		{"nobody's rules", "", nil},
		{"our own table", `$NFT add table inet m3ot; $NFT 'add chain inet m3ot forward { type filter hook forward priority 0; policy drop; }'`, nil},
		{"Docker", `$IPT -P FORWARD DROP`, []string{"the firewall's chain FORWARD (table filter) drops what is forwarded: apps cannot reach the internet | iptables -I FORWARD -i m3ot-+ -j ACCEPT && iptables -I FORWARD -o m3ot-+ -j ACCEPT (lost at a reboot"}},
		{"Docker, mended as the hint says", `$IPT -P FORWARD DROP; $IPT -I FORWARD -i m3ot-+ -j ACCEPT && $IPT -I FORWARD -o m3ot-+ -j ACCEPT`, nil},
		{"Docker, with rules for others alone", `$IPT -P FORWARD DROP; $IPT -A FORWARD -i docker0 -j ACCEPT; $IPT -A FORWARD -s 198.51.0.0/16 -j ACCEPT`, []string{"table filter"}},
		{"Docker's own chain, mended there", `$IPT -P FORWARD DROP; $IPT -N DOCKER-USER; $IPT -A FORWARD -j DOCKER-USER; $IPT -A DOCKER-USER -i m3ot-+ -j ACCEPT`, nil},
		{"ufw", `$IPT -P INPUT DROP; $IPT -P FORWARD DROP`, []string{"chain FORWARD", "chain INPUT (table filter) drops what comes in: apps get no name service and cannot call each other | iptables -I INPUT -i m3ot-+ -j ACCEPT; m3o's own rules still close this host to apps"}},
		{"ufw, opened for the network", `$IPT -P INPUT DROP; $IPT -P FORWARD DROP; $IPT -N ufw-user-forward; $IPT -A FORWARD -j ufw-user-forward; $IPT -A ufw-user-forward -s 198.18.0.0/16 -j ACCEPT; $IPT -A INPUT -s 198.18.0.0/16 -j ACCEPT`, nil},
		{"a last rule that drops", `$IPT -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT; $IPT -A FORWARD -j DROP`, []string{"chain FORWARD"}},
		{"firewalld", strings.Replace(firewalld, "%s", "", 1), []string{"chain filter_FORWARD (table firewalld) drops what is forwarded", "firewall-cmd --permanent --zone=trusted --add-source=198.18.0.0/16 && firewall-cmd --reload"}},
		{"firewalld, with the network trusted", strings.Replace(firewalld, "%s", "ip saddr 198.18.0.0/16 goto fwd_trusted", 1), nil},
		{"IPv6, which apps do not have", `$NFT add table ip6 x; $NFT 'add chain ip6 x f { type filter hook forward priority 0; policy drop; }'`, nil},
		{"the old iptables", `$OLD -P FORWARD DROP`, []string{"chain FORWARD (table filter of iptables-legacy) drops", "iptables-legacy -I FORWARD -i m3ot-+ -j ACCEPT"}},
		{"the old iptables, mended", `$OLD -P FORWARD DROP; $OLD -I FORWARD -i m3ot-+ -j ACCEPT`, nil},
	} {
		if strings.Contains(c.rules, "$OLD") && legacy == ":" {
			continue
		}
		clean()
		sh(c.rules)
		got := d.checkFirewalls(t.Context())
		if text := problems(got); len(c.want) == 0 && len(got) > 0 || len(c.want) > 0 && len(got) == 0 {
			t.Errorf("%s: %q, want %q", c.what, text, c.want)
		} else {
			for _, w := range c.want {
				if !strings.Contains(text, w) {
					t.Errorf("%s: %q, want %q", c.what, text, w)
				}
			}
		}
	}
}

func TestRuncThatIsNone(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	notMine := script("closed", "#!/bin/sh\n")
	if err := os.Chmod(notMine, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, path, want string }{
		{"missing", filepath.Join(dir, "none"), "runc cannot be run from " + filepath.Join(dir, "none") + ", so no app can start: no such file"},
		{"not executable", notMine, "permission denied"},
		{"no program", script("text", "\x00\x01\x02"), "does not run, so no app can start"},
		{"another program", script("other", "#!/bin/sh\necho hello\n"), "is no runc"},
		{"failing", script("bad", "#!/bin/sh\nexit 3\n"), "exit status 3"},
		{"old", script("old", "#!/bin/sh\necho runc version 1.1.5\n"), "runc 1.1.5 has known ways out"},
		{"new", script("new", "#!/bin/sh\necho runc version 1.4.0\n"), ""},
		{"upstream's", need.Bin(t, "runc"), ""},
	} {
		var text string
		for _, p := range Check(t.Context(), Config{Name: "m3ot", Runc: c.path, Shim: "/bin/true", Subnet: netip.MustParsePrefix("198.18.0.0/16")}) {
			if strings.Contains(p.Msg, "runc") {
				text += p.Msg + "\n"
				if !strings.Contains(p.Hint, "install m3o again") {
					t.Errorf("%s: hint %q", c.what, p.Hint)
				}
			}
		}
		if !strings.Contains(text, c.want) || c.want == "" && text != "" {
			t.Errorf("%s: %q, want %q", c.what, text, c.want)
		}
	}
	// One that never ends does not hold the check up.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if got := problems(checkRunc(ctx, script("hangs", "#!/bin/sh\nsleep 1000 & wait\n"))); !strings.Contains(got, "does not say its version") {
		t.Errorf("one that hangs: %q", got)
	}
}

func TestCgroupControllersThatAreMissing(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	write("v2/cgroup.controllers", "cpuset cpu io pids\n")
	write("whole/cgroup.controllers", "cpuset cpu io memory pids\n")
	v2 := func(name string) string {
		return "30 25 0:26 / " + filepath.Join(dir, name) + " rw - cgroup2 cgroup2 rw\n"
	}
	for _, c := range []struct {
		what, mounts string
		want         []string
	}{
		{"none", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n", []string{"there are no cgroups, so no app can be limited", "mount -t cgroup2"}},
		{"v2 without memory", v2("v2"), []string{"the cgroup controller memory is not available", "cgroup_enable=memory"}},
		{"v2", v2("whole"), nil},
		{"v1 without pids", "30 25 0:26 / /c/m rw - cgroup cgroup rw,memory\n31 25 0:27 / /c/c rw - cgroup cgroup rw,cpu,cpuacct\n", []string{"the cgroup controller pids is not available"}},
		{"v1", "30 25 0:26 / /c/m rw - cgroup cgroup rw,memory\n31 25 0:27 / /c/c rw - cgroup cgroup rw,cpu\n32 25 0:28 / /c/p rw - cgroup cgroup rw,pids\n", nil},
	} {
		text := problems(checkCgroups("m3ot", write("mountinfo", c.mounts)))
		if len(c.want) == 0 && text != "" || strings.Count(text, "\n") > 1 {
			t.Errorf("%s: %q", c.what, text)
		}
		for _, w := range c.want {
			if !strings.Contains(text, w) {
				t.Errorf("%s: %q, want %q", c.what, text, w)
			}
		}
	}
}

func TestSubnetThatOverlapsARouteOfTheHost(t *testing.T) {
	need.Root(t)
	ip := need.Program(t, "ip")
	if out, err := exec.Command("sh", "-ec", ip+" link add m3otlan type veth peer name m3otlan2 && "+ip+" addr add 198.18.7.1/24 dev m3otlan && "+ip+" link set m3otlan up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command(ip, "link", "del", "m3otlan").Run() })
	check := func(subnet string) string {
		return problems(Check(t.Context(), Config{Name: "m3ot", Runc: need.Bin(t, "runc"), Shim: "/bin/true", Subnet: netip.MustParsePrefix(subnet)}))
	}
	if got := check("198.18.0.0/16"); !strings.Contains(got, "the network 198.18.7.0/24 of this host (device m3otlan) overlaps 198.18.0.0/16") || !strings.Contains(got, "--subnet") {
		t.Errorf("%q", got)
	}
	if got := check("198.19.0.0/16"); strings.Contains(got, "overlaps") {
		t.Errorf("another network: %q", got)
	}
}
