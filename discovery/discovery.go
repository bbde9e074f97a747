// Package discovery says who is where on the apps' networks: which instance has
// which address, which of them take calls, and which apps may reach which. It
// also is the apps' name server. Peers are made by who starts instances and
// used by who serves them, which is another process and goes on without the
// first.
//
// It must not know how instances are started, nor what is said to them.
package discovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
)

// Zone is the domain that names of apps are in, for apps.
const Zone = "internal"

// A Peer is an instance, or a one-off command, on the apps' networks.
type Peer struct {
	ID    string     `json:"id"`
	App   string     `json:"app"`
	Addr  netip.Addr `json:"addr"`
	Ready bool       `json:"ready,omitempty"` // it takes connections
}

// Peers are all there are, and Links says which app may reach which others. An
// app may always reach itself.
type Peers struct {
	Peers []Peer              `json:"peers"`
	Links map[string][]string `json:"links,omitempty"`
	// Partial says that whoever tells has just begun: a peer that was ready
	// before and is not called so has not been asked yet.
	Partial bool `json:"partial,omitempty"`
}

// maxPeers bounds memory, not use: addresses end before.
const maxPeers = 1 << 20

// Validate reports the first fault.
func (p Peers) Validate() error {
	if len(p.Peers) > maxPeers {
		return m3o.Errorf(m3o.Invalid, "%d peers are more than %d", len(p.Peers), maxPeers)
	}
	for _, x := range p.Peers {
		if !x.Addr.IsValid() || x.App == "" {
			return m3o.Errorf(m3o.Invalid, "peer %q has no address or no app", x.ID)
		}
	}
	return nil
}

// A Directory answers questions about the Peers it was given last. The zero
// Directory knows nobody. It is safe for concurrent use.
type Directory struct{ now atomic.Pointer[index] }

type index struct {
	at    map[netip.Addr]Peer
	ready map[string][]netip.Addr
	links map[string][]string
}

// Set makes p all there is.
func (d *Directory) Set(p Peers) {
	x := &index{at: make(map[netip.Addr]Peer, len(p.Peers)), ready: map[string][]netip.Addr{}, links: p.Links}
	for _, peer := range p.Peers {
		x.at[peer.Addr] = peer
		if peer.Ready {
			x.ready[peer.App] = append(x.ready[peer.App], peer.Addr)
		}
	}
	for _, as := range x.ready {
		slices.SortFunc(as, netip.Addr.Compare)
	}
	d.now.Store(x)
}

// Complete is p with what is known already of peers that p does not know well.
func (d *Directory) Complete(p Peers) Peers {
	if !p.Partial {
		return p
	}
	p.Partial, p.Peers = false, slices.Clone(p.Peers)
	for i := range p.Peers {
		x := &p.Peers[i]
		if old, ok := d.At(x.Addr); ok && old.ID == x.ID {
			x.Ready = x.Ready || old.Ready
		}
	}
	return p
}

// At is who has an address.
func (d *Directory) At(a netip.Addr) (Peer, bool) {
	x := d.now.Load()
	if x == nil {
		return Peer{}, false
	}
	p, ok := x.at[a]
	return p, ok
}

// May is whether instances of from may reach those of to. A preview may reach
// what the app may that it is a preview of.
func (d *Directory) May(from, to string) bool {
	x := d.now.Load()
	return x != nil && from != "" && (from == to || slices.Contains(x.links[m3o.ParentOf(from)], to))
}

// Ready are the addresses of an app's ready instances, in order.
func (d *Directory) Ready(app string) []netip.Addr {
	if x := d.now.Load(); x != nil {
		return x.ready[app]
	}
	return nil
}

// Save keeps p in a file, for the next process.
func (p Peers) Save(file string) error {
	b, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encode peers: %w", err)
	}
	return atomicfile.Write(file, b, 0o600)
}

// Load reads what Save wrote; none when there is no such file.
func Load(file string) (Peers, error) {
	var p Peers
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &p)
	}
	if err == nil {
		err = p.Validate()
	}
	if err != nil {
		return Peers{}, fmt.Errorf("read peers: %w", err)
	}
	return p, nil
}
