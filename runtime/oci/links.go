//go:build linux

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/google/nftables"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/discovery"
	"github.com/m3o/m3o/internal/atomicfile"
)

// links says which apps' instances may open connections to which others', and
// keeps the firewall's set of pairs at it. It is on disk, so that a driver that
// opens writes the firewall with its pairs in one step: what may talk is not
// interrupted by a restart of the daemon.
type links struct {
	file string
	put  func([]pair) error // makes these the firewall's pairs

	mu      sync.Mutex // guards below
	allowed map[string][]string
	members map[string]member // by instance
	sent    []pair
}

type member struct {
	app string
	ip  netip.Addr
}

// A pair of addresses: the first may open connections to the second.
type pair [2]netip.Addr

func openLinks(file string, put func([]pair) error) (*links, error) {
	l := &links{file: file, put: put, allowed: map[string][]string{}, members: map[string]member{}}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &l.allowed)
	}
	if err != nil {
		return nil, fmt.Errorf("read links: %w", err)
	}
	return l, nil
}

// SetLinks makes allowed, which maps an app to those it may reach, all there
// is: it holds for what runs and for what will, also after the daemon has gone.
// Connections that are open stay so.
func (d *Driver) SetLinks(allowed map[string][]string) error { return d.links.set(allowed) }

func (l *links) set(allowed map[string][]string) error {
	if allowed == nil {
		allowed = map[string][]string{}
	}
	b, err := json.Marshal(allowed)
	if err != nil {
		return fmt.Errorf("encode links: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := atomicfile.Write(l.file, b, 0o600); err != nil {
		return fmt.Errorf("record links: %w", err)
	}
	l.allowed = allowed
	return l.apply()
}

// join notes an instance before its program runs.
func (l *links) join(id, app string, ip netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.members[id] = member{app, ip}
	return l.apply()
}

// leave forgets an instance before its address can become another's.
func (l *links) leave(id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.members[id]; !ok {
		return nil
	}
	delete(l.members, id)
	return l.apply()
}

// apply brings the firewall up to date. The caller holds mu.
func (l *links) apply() error {
	want := l.pairs()
	if slices.Equal(want, l.sent) {
		return nil
	}
	if err := l.put(want); err != nil {
		return err
	}
	l.sent = want
	return nil
}

// pairs are those of all members, in order. The caller holds mu.
func (l *links) pairs() []pair {
	callers, called := map[string][]netip.Addr{}, map[string][]netip.Addr{}
	for _, m := range l.members {
		// A preview may reach what the app may that it is a preview of.
		callers[m3o.ParentOf(m.app)] = append(callers[m3o.ParentOf(m.app)], m.ip)
		called[m.app] = append(called[m.app], m.ip)
	}
	var all []pair
	for from, tos := range l.allowed {
		for _, to := range tos {
			for _, a := range callers[from] {
				for _, b := range called[to] {
					if a != b {
						all = append(all, pair{a, b})
					}
				}
			}
		}
	}
	slices.SortFunc(all, func(x, y pair) int {
		if c := x[0].Compare(y[0]); c != 0 {
			return c
		}
		return x[1].Compare(y[1])
	})
	return slices.Compact(all)
}

// Peers are who is on the apps' networks now, and who may reach whom.
func (d *Driver) Peers() discovery.Peers {
	ready := map[string]bool{}
	for _, in := range d.Instances() {
		ready[in.ID] = in.Phase == m3o.Ready && in.Addr != ""
	}
	d.links.mu.Lock()
	defer d.links.mu.Unlock()
	p := discovery.Peers{Links: maps.Clone(d.links.allowed)}
	for id, m := range d.links.members {
		p.Peers = append(p.Peers, discovery.Peer{ID: id, App: m.app, Addr: m.ip, Ready: ready[id]})
	}
	return p
}

// OnJoin has f called when there is a new peer, before its program runs. Call
// it before Serve.
func (d *Driver) OnJoin(f func(context.Context)) { d.joined = f }

func elements(pairs []pair) []nftables.SetElement {
	var all []nftables.SetElement
	for _, p := range pairs {
		all = append(all, nftables.SetElement{Key: append(p[0].AsSlice(), p[1].AsSlice()...)})
	}
	return all
}

func (n *network) pairSet() *nftables.Set {
	return &nftables.Set{Table: n.nftTable(), Name: "pairs", Concatenation: true,
		KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr)}
}

// putPairs replaces the pairs in one transaction.
func (n *network) putPairs(pairs []pair) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	set := n.pairSet()
	c.FlushSet(set)
	if len(pairs) > 0 {
		if err := c.SetAddElements(set, elements(pairs)); err != nil {
			return fmt.Errorf("add pairs: %w", err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write pairs: %w", err)
	}
	return nil
}
