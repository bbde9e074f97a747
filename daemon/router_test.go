package daemon

import (
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/m3o/m3o"
)

// The hint was for TCP, and told to give --http3 another address, which it does
// not take.
func TestTakenUDPPortIsToldApartFromTCP(t *testing.T) {
	err := portError("http3", "127.0.0.1:443", &net.OpError{Op: "listen", Err: syscall.EADDRINUSE})
	e, ok := errors.AsType[*m3o.Error](err)
	if !ok || !strings.Contains(e.Msg, "UDP") || !strings.Contains(e.Hint, "ss -lunp") || !strings.Contains(e.Hint, "another address with --https") {
		t.Errorf("%v, hint %q", err, e.Hint)
	}
}
