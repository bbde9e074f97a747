package runtime

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

// ReadListeners reads the listening sockets from a /proc/net/tcp or
// /proc/net/tcp6 file (see proc_net_tcp in the kernel's documentation: each
// group of four address bytes is one number in the machine's byte order; only
// little-endian machines are supported). With inodes, only those sockets count.
func ReadListeners(r io.Reader, inodes map[string]bool) ([]netip.AddrPort, error) {
	var all []netip.AddrPort
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 10 || f[3] != "0A" || inodes != nil && !inodes[f[9]] { // TCP_LISTEN
			continue
		}
		host, port, _ := strings.Cut(f[1], ":")
		b, err := hex.DecodeString(host)
		if err != nil || len(b) != 4 && len(b) != 16 {
			return nil, fmt.Errorf("socket address %q is malformed", f[1])
		}
		n, err := strconv.ParseUint(port, 16, 16)
		if err != nil {
			return nil, fmt.Errorf("socket address %q is malformed", f[1])
		}
		for i := 0; i < len(b); i += 4 {
			b[i], b[i+1], b[i+2], b[i+3] = b[i+3], b[i+2], b[i+1], b[i]
		}
		a, _ := netip.AddrFromSlice(b)
		all = append(all, netip.AddrPortFrom(a.Unmap(), uint16(n)))
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read sockets: %w", err)
	}
	return all, nil
}
