package build

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"time"
)

// restPause is how long no build has run when memory is given back: a second
// push right after the first finds it as it was.
const restPause = 10 * time.Second

// giveBack returns memory to the system when builds have ended. Left alone, a
// collector keeps twice what is in use, and pools of buffers, the better half
// of what builds leave, outlive it: it takes two minutes for the first to run
// without work, and as long again for the pools.
func (b *Builder) giveBack(ctx context.Context) {
	t := time.NewTimer(restPause) // a start leaves much, too
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.builds.idle:
			t.Reset(restPause)
		case <-t.C:
			if b.builds.busy() {
				continue // its end is told
			}
			if err := b.rest(ctx); err != nil && ctx.Err() == nil {
				b.log.Debug("give back memory of builds", "err", err)
			}
		}
	}
}

// rest collects twice, here and in buildkitd: pools empty with the second.
func (b *Builder) rest(ctx context.Context) error {
	runtime.GC()
	debug.FreeOSMemory()
	for range 2 {
		if _, err := b.askDebug(ctx, "/debug/gc"); err != nil {
			return err
		}
	}
	return nil
}

// askDebug asks buildkitd's debug server, which root alone reaches.
func (b *Builder) askDebug(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://buildkitd"+path, nil)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialContext(ctx, "unix", b.debugSocket())
	}}
	defer tr.CloseIdleConnections()
	res, err := tr.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask buildkitd for %s: %w", path, err)
	}
	defer res.Body.Close() //nolint:errcheck // only read
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask buildkitd for %s: %s", path, res.Status)
	}
	return io.ReadAll(io.LimitReader(res.Body, 16<<20))
}
