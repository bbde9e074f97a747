//go:build linux

package oci

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
)

// addresses hands out the instances' addresses, in turn round the whole
// subnet, and none again within a minute: somebody may still be talking to
// the one who had it. Which are taken is in the bundles; only how far the turn
// has come is recorded, a block ahead.
type addresses struct {
	subnet netip.Prefix
	file   string

	mu       sync.Mutex // guards below
	next     uint32     // offset in the subnet
	recorded uint32     // next may come up to here without recording again
	taken    map[netip.Addr]bool
	freed    map[netip.Addr]time.Time
}

const (
	addressBlock = 256
	notAgain     = time.Minute
)

func newAddresses(subnet netip.Prefix, dir string) (*addresses, error) {
	a := &addresses{subnet: subnet, file: filepath.Join(dir, "next-address"),
		taken: map[netip.Addr]bool{}, freed: map[netip.Addr]time.Time{}}
	b, err := os.ReadFile(a.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read %s: %w", a.file, err)
	}
	if n, err := strconv.ParseUint(string(b), 10, 32); err == nil {
		a.next = uint32(n)
	}
	a.recorded = a.next
	return a, nil
}

// take gives an address that is nobody's.
func (a *addresses) take() (netip.Addr, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	size := uint32(1) << (32 - a.subnet.Bits())
	base := a.subnet.Masked().Addr().As4()
	for ip, at := range a.freed {
		if time.Since(at) > notAgain {
			delete(a.freed, ip)
		}
	}
	for range size {
		if a.next == a.recorded {
			n := (a.recorded + addressBlock) % size
			if err := atomicfile.Write(a.file, strconv.AppendUint(nil, uint64(n), 10), 0o600); err != nil {
				return netip.Addr{}, fmt.Errorf("record address: %w", err)
			}
			a.recorded = n
		}
		n := a.next
		a.next = (a.next + 1) % size
		if n == 0 || n == size-1 { // network and broadcast address
			continue
		}
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(base[:])+n)
		ip := netip.AddrFrom4(b)
		if _, recent := a.freed[ip]; recent || a.taken[ip] {
			continue
		}
		a.taken[ip] = true
		return ip, nil
	}
	return netip.Addr{}, m3o.Errorf(m3o.Unavailable, "no free address in %s", a.subnet)
}

// claim marks an address found in use.
func (a *addresses) claim(ip netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.taken[ip] = true
}

func (a *addresses) free(ip netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.taken[ip] {
		delete(a.taken, ip)
		a.freed[ip] = time.Now()
	}
}

// users gives every app a user id of its own, for good: files it might leave
// anywhere, and signals, stay its own.
type users struct {
	base int
	file string

	mu sync.Mutex // guards below
	of map[string]int
}

const maxUsers = 1 << 16

func newUsers(base int, dir string) (*users, error) {
	u := &users{base: base, file: filepath.Join(dir, "users.json"), of: map[string]int{}}
	b, err := os.ReadFile(u.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return u, nil
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", u.file, err)
	}
	if err := json.Unmarshal(b, &u.of); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w", u.file, err)
	}
	return u, nil
}

// id is the user and group id of an app.
func (u *users) id(app string) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if n, ok := u.of[app]; ok {
		return u.base + n, nil
	}
	n := 0
	for _, used := range u.of {
		n = max(n, used+1)
	}
	if n >= maxUsers {
		return 0, m3o.Errorf(m3o.Unavailable, "%d apps have had a user id, there are no more", n)
	}
	u.of[app] = n
	b, err := json.Marshal(u.of)
	if err == nil {
		err = atomicfile.Write(u.file, b, 0o600)
	}
	if err != nil {
		delete(u.of, app)
		return 0, fmt.Errorf("record user id: %w", err)
	}
	return u.base + n, nil
}
