package router

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The PROXY protocol tells who is behind a TCP proxy, see
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt.

const (
	proxyV1Max = 107 // bytes of a version 1 line, CRLF included
	proxyV2Max = 512 // bytes after a version 2 head; TLVs beyond are refused
)

var proxyV2Sig = []byte("\r\n\r\n\x00\r\nQUIT\n")

var errProxyHead = errors.New("malformed PROXY protocol head")

// readProxyHead reads one head. The zero AddrPort means that the proxy speaks
// for itself.
func readProxyHead(br *bufio.Reader) (netip.AddrPort, error) {
	b, err := br.Peek(1)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if b[0] == proxyV2Sig[0] {
		return readProxyV2(br)
	}
	return readProxyV1(br)
}

func readProxyV1(br *bufio.Reader) (none netip.AddrPort, err error) {
	var line []byte
	for len(line) < 2 || line[len(line)-1] != '\n' {
		c, err := br.ReadByte()
		if err != nil {
			return none, err
		}
		if line = append(line, c); len(line) > proxyV1Max {
			return none, errProxyHead
		}
	}
	text, ok := bytes.CutSuffix(line, []byte("\r\n"))
	f := strings.Split(string(text), " ")
	if !ok || f[0] != "PROXY" || len(f) < 2 {
		return none, errProxyHead
	}
	if f[1] == "UNKNOWN" {
		return none, nil
	}
	if len(f) != 6 || f[1] != "TCP4" && f[1] != "TCP6" {
		return none, errProxyHead
	}
	var ap [2]netip.AddrPort
	for i := range ap {
		addr, err := netip.ParseAddr(f[2+i])
		port, perr := strconv.ParseUint(f[4+i], 10, 16)
		if err != nil || perr != nil || addr.Zone() != "" || addr.Is4() != (f[1] == "TCP4") {
			return none, errProxyHead
		}
		ap[i] = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	}
	return ap[0], nil
}

func readProxyV2(br *bufio.Reader) (none netip.AddrPort, err error) {
	var head [16]byte
	if _, err := io.ReadFull(br, head[:]); err != nil {
		return none, err
	}
	n := int(binary.BigEndian.Uint16(head[14:]))
	if !bytes.Equal(head[:12], proxyV2Sig) || head[12]>>4 != 2 || n > proxyV2Max {
		return none, errProxyHead
	}
	rest := make([]byte, n)
	if _, err := io.ReadFull(br, rest); err != nil {
		return none, err
	}
	switch head[12] & 0xf {
	case 0: // LOCAL
		return none, nil
	case 1: // PROXY
	default:
		return none, errProxyHead
	}
	size := 0
	switch head[13] >> 4 {
	case 1:
		size = 4
	case 2:
		size = 16
	default:
		return none, nil // unspecified or a unix socket
	}
	if n < 2*size+4 {
		return none, errProxyHead
	}
	addr, _ := netip.AddrFromSlice(rest[:size])
	return netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(rest[2*size:])), nil
}

// proxied is a connection that begins with such a head. It is read when the
// client's address or its first byte is asked for, which is never in the
// goroutine that accepts.
type proxied struct {
	net.Conn
	limit time.Duration
	once  sync.Once
	br    *bufio.Reader
	from  net.Addr
	err   error
}

func (c *proxied) head() {
	c.once.Do(func() {
		c.br, c.from = bufio.NewReaderSize(c.Conn, 1024), c.Conn.RemoteAddr()
		_ = c.Conn.SetReadDeadline(time.Now().Add(c.limit))
		ap, err := readProxyHead(c.br)
		_ = c.Conn.SetReadDeadline(time.Time{})
		switch {
		case err != nil:
			c.err = fmt.Errorf("read PROXY protocol head: %w", err)
			_ = c.Conn.Close()
		case ap.IsValid():
			c.from = net.TCPAddrFromAddrPort(ap)
		}
	})
}

// RemoteAddr implements net.Conn: whom the proxy speaks for.
func (c *proxied) RemoteAddr() net.Addr {
	c.head()
	return c.from
}

// Read implements net.Conn.
func (c *proxied) Read(p []byte) (int, error) {
	if c.head(); c.err != nil {
		return 0, c.err
	}
	if c.br.Buffered() == 0 {
		return c.Conn.Read(p)
	}
	return c.br.Read(p)
}

// CloseWrite passes on what guardConn asks for.
func (c *proxied) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}
