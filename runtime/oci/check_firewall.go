//go:build linux

package oci

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// checkFirewalls finds the tables of others that drop what instances send or
// get: what our table accepts they drop all the same. Docker, ufw and
// firewalld are the usual ones.
func (d *Driver) checkFirewalls(ctx context.Context) []Problem {
	c, err := nftables.New()
	if err != nil {
		return []Problem{{fmt.Sprintf("the firewall cannot be read, and m3o needs it to keep apps apart: %v", err), "modprobe nf_tables"}}
	}
	chains, err := c.ListChains()
	if err != nil {
		return []Problem{{fmt.Sprintf("the firewall cannot be read, and m3o needs it to keep apps apart: %v", err), "modprobe nf_tables"}}
	}
	var all []Problem
	for _, ch := range chains {
		if ch.Table == nil || ch.Table.Name == d.cfg.Name || ch.Hooknum == nil || ch.Type != nftables.ChainTypeFilter {
			continue
		}
		if f := ch.Table.Family; f != nftables.TableFamilyIPv4 && f != nftables.TableFamilyINet {
			continue // instances have IPv4 alone
		}
		forward := *ch.Hooknum == *nftables.ChainHookForward
		if !forward && *ch.Hooknum != *nftables.ChainHookInput {
			continue
		}
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			all = append(all, Problem{fmt.Sprintf("the rules of table %s cannot be read: %v", ch.Table.Name, err), "nft list ruleset shows them"})
			continue
		}
		if !refuses(ch, rules) || d.lets(c, ch, rules) {
			continue
		}
		all = append(all, d.firewallProblem(ch.Table.Name, ch.Name, forward))
	}
	return append(all, d.checkLegacy(ctx)...)
}

// refuses is whether a chain lets nothing through that it does not name: by its
// policy, or by a last rule that takes all.
func refuses(ch *nftables.Chain, rules []*nftables.Rule) bool {
	if ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
		return true
	}
	if len(rules) == 0 {
		return false
	}
	for _, e := range rules[len(rules)-1].Exprs {
		switch v := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return v.Kind == expr.VerdictDrop
		default:
			return false
		}
	}
	return false
}

// lets is whether a rule of the chain, or of another that it leads to, accepts
// what instances send, by the names of their devices or by their addresses.
func (d *Driver) lets(c *nftables.Conn, ch *nftables.Chain, rules []*nftables.Rule) bool {
	type part struct {
		rules []*nftables.Rule
		named bool // reached by a rule that names them
	}
	seen := map[string]bool{ch.Name: true}
	for todo := []part{{rules, false}}; len(todo) > 0; todo = todo[1:] {
		for _, r := range todo[0].rules {
			named := todo[0].named
			for _, e := range r.Exprs {
				switch v := e.(type) {
				case *expr.Cmp:
					named = named || v.Op == expr.CmpOpEq && d.isOurs(v.Data)
				case *expr.Verdict:
					if named && v.Kind == expr.VerdictAccept {
						return true
					}
					if v.Chain == "" || seen[v.Chain] {
						break
					}
					seen[v.Chain] = true
					// One that cannot be read accepts nothing, as far as we know.
					if more, err := c.GetRules(ch.Table, &nftables.Chain{Name: v.Chain, Table: ch.Table}); err == nil {
						todo = append(todo, part{more, named})
					}
				}
			}
		}
	}
	return false
}

// isOurs is whether a rule compares with the instances' devices or network.
func (d *Driver) isOurs(data []byte) bool {
	if bytes.HasPrefix(data, []byte(d.net.prefix)) {
		return true
	}
	// iptables compares only the bytes that a mask leaves.
	net := d.cfg.Subnet.Masked().Addr().AsSlice()
	return len(data) <= len(net) && len(data)*8 >= d.cfg.Subnet.Bits() && bytes.HasPrefix(net, data)
}

// firewallProblem says what such a chain breaks, and how it is mended in the
// words of whoever made it.
func (d *Driver) firewallProblem(table, chain string, forward bool) Problem {
	msg := fmt.Sprintf("the firewall's chain %s (table %s) drops what is forwarded: apps cannot reach the internet", chain, table)
	hint := fmt.Sprintf("iptables -I FORWARD -i %[1]s-+ -j ACCEPT && iptables -I FORWARD -o %[1]s-+ -j ACCEPT", d.cfg.Name)
	if !forward {
		msg = fmt.Sprintf("the firewall's chain %s (table %s) drops what comes in: apps get no name service and cannot call each other", chain, table)
		hint = fmt.Sprintf("iptables -I INPUT -i %s-+ -j ACCEPT; m3o's own rules still close this host to apps", d.cfg.Name)
	}
	if exists("/etc/ufw/ufw.conf") && table == "filter" {
		hint = fmt.Sprintf("ufw route allow from %[1]s && ufw route allow to %[1]s", d.cfg.Subnet)
		if !forward {
			hint = fmt.Sprintf("ufw allow from %s", d.cfg.Subnet)
		}
	}
	if table == "firewalld" {
		hint = fmt.Sprintf("firewall-cmd --permanent --zone=trusted --add-source=%s && firewall-cmd --reload", d.cfg.Subnet)
	}
	if strings.HasPrefix(hint, "iptables") {
		hint += " (lost at a reboot: keep it with iptables-persistent, or in what sets up the firewall)"
	}
	return Problem{msg, hint}
}

// checkLegacy asks the old iptables, whose rules nftables does not show.
func (d *Driver) checkLegacy(ctx context.Context) []Problem {
	b, err := os.ReadFile("/proc/self/net/ip_tables_names")
	if err != nil || !strings.Contains("\n"+string(b), "\nfilter\n") {
		return nil // nobody uses it
	}
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "iptables-legacy", "-S")
	cmd.WaitDelay = 100 * time.Millisecond
	out, err := cmd.Output()
	if err != nil {
		return []Problem{{fmt.Sprintf("there are rules of the old iptables, and they cannot be read: %v", err), "iptables-legacy -S FORWARD shows them; what it drops, apps lack"}}
	}
	var all []Problem
	for _, chain := range []string{"FORWARD", "INPUT"} {
		drops, lets := false, false
		for l := range strings.Lines(string(out)) {
			l = strings.TrimSpace(l)
			drops = drops || l == "-P "+chain+" DROP" || l == "-A "+chain+" -j DROP" || strings.HasPrefix(l, "-A "+chain+" -j REJECT")
			lets = lets || strings.HasPrefix(l, "-A ") && strings.HasSuffix(l, "-j ACCEPT") &&
				(strings.Contains(l, "-i "+d.net.prefix) || strings.Contains(l, "-s "+d.cfg.Subnet.String()))
		}
		if drops && !lets {
			p := d.firewallProblem("filter of iptables-legacy", chain, chain == "FORWARD")
			p.Hint = strings.ReplaceAll(p.Hint, "iptables -", "iptables-legacy -")
			all = append(all, p)
		}
	}
	return all
}
