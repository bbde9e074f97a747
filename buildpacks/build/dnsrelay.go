package build

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Limits of the relay. A build asks a handful of names; beyond this many
// questions at once further ones are dropped and asked again by the resolver.
const (
	maxQuestions = 64
	dnsTimeout   = 5 * time.Second
)

// relayDNS passes DNS messages between the builds and the host's loopback
// resolver as they are, over UDP and TCP, while a veth is there to listen on.
// The function it returns stops it and waits.
func (b *Builder) relayDNS(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	here := netip.AddrPortFrom(b.network.host(), 53)
	up := netip.AddrPortFrom(b.network.dns.relayTo, 53)
	wg.Go(func() { b.keepListening(ctx, func() error { return relayUDP(ctx, here, up) }) })
	wg.Go(func() { b.keepListening(ctx, func() error { return relayTCP(ctx, here, up) }) })
	return func() { cancel(); wg.Wait() }
}

// keepListening begins again whenever the address comes with a new veth.
func (b *Builder) keepListening(ctx context.Context, serve func() error) {
	for ctx.Err() == nil {
		b.mu.Lock()
		changed := b.changed
		b.mu.Unlock()
		if err := serve(); err != nil && ctx.Err() == nil {
			b.log.Debug("dns relay for builds", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-changed: // buildkitd came or went, and the address with it
		case <-time.After(time.Second):
		}
	}
}

func relayUDP(ctx context.Context, here, up netip.AddrPort) error {
	l, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(here))
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	defer l.Close() //nolint:errcheck // read side only
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, maxQuestions)
	for {
		buf := make([]byte, 64<<10)
		n, from, err := l.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		select {
		case free <- struct{}{}:
		default:
			continue
		}
		wg.Go(func() {
			defer func() { <-free }()
			if answer, err := askUDP(ctx, up, buf[:n]); err == nil {
				_, _ = l.WriteToUDPAddrPort(answer, from)
			}
		})
	}
}

// askUDP sends one message and returns the answer. Both go unread.
func askUDP(ctx context.Context, up netip.AddrPort, q []byte) ([]byte, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", up.String())
	if err != nil {
		return nil, err
	}
	defer c.Close() //nolint:errcheck // one question, one answer
	if err := c.SetDeadline(time.Now().Add(dnsTimeout)); err != nil {
		return nil, err
	}
	if _, err := c.Write(q); err != nil {
		return nil, err
	}
	buf := make([]byte, 64<<10)
	n, err := c.Read(buf)
	return buf[:n], err
}

func relayTCP(ctx context.Context, here, up netip.AddrPort) error {
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(here))
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	defer l.Close() //nolint:errcheck // nothing to lose
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, maxQuestions)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		select {
		case free <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-free }()
			joinTCP(ctx, c, up)
		})
	}
}

func joinTCP(ctx context.Context, c net.Conn, up netip.AddrPort) {
	defer c.Close() //nolint:errcheck // either side may have ended it
	var d net.Dialer
	u, err := d.DialContext(ctx, "tcp", up.String())
	if err != nil {
		return
	}
	defer u.Close() //nolint:errcheck // either side may have ended it
	end := time.Now().Add(dnsTimeout)
	if err := errors.Join(c.SetDeadline(end), u.SetDeadline(end)); err != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(u, c) })
	_, _ = io.Copy(c, u)
	_ = c.Close() // ends the other copy
	wg.Wait()
}
