package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// A goProxy reads modules the way the go command does: GOPROXY is a list of
// proxies; after a comma the next one is asked only if the module is not
// there (404 or 410), after a bar for any error. "off" ends the list with an
// error. So does "direct": a toolchain has no repository to be had from.
type goProxy struct {
	list   []proxyEntry
	client *http.Client
}

type proxyEntry struct {
	url      *url.URL // nil for off and direct
	word     string
	anyError bool // the separator after it was a bar
}

// errNotThere is a proxy's definite no.
var errNotThere = errors.New("not found")

func parseGoProxy(s string) (*goProxy, error) {
	p := &goProxy{client: &http.Client{Timeout: 10 * time.Minute}}
	for s != "" {
		i := strings.IndexAny(s, ",|")
		e, bar := s, false
		if i >= 0 {
			e, bar, s = s[:i], s[i] == '|', s[i+1:]
		} else {
			s = ""
		}
		e = strings.TrimSpace(e)
		switch {
		case e == "":
			continue
		case e == "off" || e == "direct":
			p.list = append(p.list, proxyEntry{word: e})
			return p, nil // nothing after them is ever asked
		}
		u, err := url.Parse(e)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
			// The text may hold a password: it is not repeated.
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "GOPROXY has an entry that is no http or https address", Hint: "separate addresses by commas; direct and off are words of their own"}
		}
		p.list = append(p.list, proxyEntry{url: u, word: u.Redacted(), anyError: bar})
	}
	if len(p.list) == 0 {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "no Go module proxy is configured", Hint: "start m3od with --goproxy and the address of one"}
	}
	return p, nil
}

// open reads path, "golang.org/toolchain/@v/list", from the first proxy that has it.
func (p *goProxy) open(ctx context.Context, path string) (io.ReadCloser, error) {
	var last error
	for _, e := range p.list {
		if e.url == nil {
			if last != nil {
				return nil, last // what the proxy said is more to the point
			}
			return nil, fmt.Errorf("GOPROXY says %s: no module proxy to fetch %s from", e.word, path)
		}
		r, err := p.get(ctx, e.url, path)
		if err == nil {
			return r, nil
		}
		last = fmt.Errorf("fetch %s from %s: %w", path, e.word, err)
		if ctx.Err() != nil || !e.anyError && !errors.Is(err, errNotThere) {
			return nil, last
		}
	}
	return nil, last
}

// read is open for answers of at most limit bytes.
func (p *goProxy) read(ctx context.Context, path string, limit int64) ([]byte, error) {
	r, err := p.open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer r.Close() //nolint:errcheck // read only
	return readLimited(r, limit)
}

func readLimited(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("the answer is larger than %d bytes", limit)
	}
	return b, err
}

func (p *goProxy) get(ctx context.Context, base *url.URL, path string) (io.ReadCloser, error) {
	// Opaque escapes of module paths survive only if path is joined as it is.
	u := *base
	u.Path = strings.TrimSuffix(u.Path, "/") + "/" + path
	u.RawPath = ""
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, errors.New("the address is malformed")
	}
	resp, err := p.client.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok {
			err = ue.Err // without the address, which may hold a password
		}
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.Body, nil
	case http.StatusNotFound, http.StatusGone:
		err = fmt.Errorf("%w (%s)", errNotThere, resp.Status)
	default:
		err = errors.New(resp.Status)
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10)) // lets the connection live on
	_ = resp.Body.Close()
	return nil, err
}

// goEnv is a setting of the go command: set by the operator, else in the
// daemon's environment.
func goEnv(set, name string) string {
	if set != "" {
		return set
	}
	return os.Getenv(name)
}
