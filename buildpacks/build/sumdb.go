package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb"
)

// The checksum database the go command trusts by default, as its verifier key:
// the name, a hash and the public key.
const defaultSumDBKey = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"

// A sumDB checks module hashes against a checksum database, as the go command
// does: GOSUMDB is "off", a known name, or a verifier key with an optional
// address; the database is asked through the proxy where the proxy offers it
// (its /sumdb/NAME/supported answers 200) and directly where not.
type sumDB struct {
	client *sumdb.Client
	ops    *sumOps
}

// newSumDB returns nil, nil when there is to be no checking: GOSUMDB=off, or
// the module matches GONOSUMDB or GOPRIVATE.
func newSumDB(gosumdb, nosumdb, dir string, proxy *goProxy, mod string) (*sumDB, error) {
	if gosumdb == "off" || module.MatchPrefixPatterns(nosumdb, mod) {
		return nil, nil
	}
	f := strings.Fields(gosumdb)
	key, direct := defaultSumDBKey, ""
	known, _, _ := strings.Cut(defaultSumDBKey, "+")
	switch {
	case len(f) == 0 || f[0] == known && len(f) <= 2:
	case len(f) <= 2 && strings.Count(f[0], "+") >= 2:
		key = f[0]
	default:
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "GOSUMDB names a checksum database whose key is not known", Hint: "write NAME+HASH+KEY, or off"}
	}
	name, _, _ := strings.Cut(key, "+")
	direct = "https://" + name
	if len(f) == 2 {
		direct = f[1]
	}
	ops := &sumOps{dir: dir, key: key, name: name, proxy: proxy, direct: direct}
	return &sumDB{client: sumdb.NewClient(ops), ops: ops}, nil
}

// verify reports whether sum is what the database has for the module version.
func (s *sumDB) verify(ctx context.Context, path, version, sum string) error {
	s.ops.use(ctx)
	lines, err := s.client.Lookup(path, version)
	if err != nil {
		return fmt.Errorf("look up %s@%s in the checksum database: %w", path, version, err)
	}
	want := path + " " + version + " " + sum
	if !slices.Contains(lines, want) {
		return &m3o.Error{Kind: m3o.Internal,
			Msg: fmt.Sprintf("%s@%s does not have the checksum the checksum database knows", path, version),
			Err: fmt.Errorf("computed %s, database says %q", sum, lines)}
	}
	return nil
}

// sumOps is what the database client needs of the world. What was verified
// once is kept under dir, so that a database that rewrites its history is noticed.
type sumOps struct {
	dir, key, name, direct string
	proxy                  *goProxy

	mu   sync.Mutex      // guards ctx and base
	ctx  context.Context // of the lookup under way; the client's interface has none
	base *goProxy        // where the database answers, once known
	path string          // before every path of base
}

func (o *sumOps) use(ctx context.Context) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ctx = ctx
}

func (o *sumOps) where() (context.Context, *goProxy, string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.base != nil {
		return o.ctx, o.base, o.path, nil
	}
	for _, e := range o.proxy.list {
		if e.url == nil {
			break
		}
		one := &goProxy{client: o.proxy.client, list: []proxyEntry{{url: e.url, word: e.word}}}
		if _, err := one.read(o.ctx, "sumdb/"+o.name+"/supported", 1<<10); err == nil {
			o.base, o.path = one, "sumdb/"+o.name
			return o.ctx, o.base, o.path, nil
		} else if !errors.Is(err, errNotThere) && !e.anyError {
			return nil, nil, "", err
		}
	}
	direct, err := parseGoProxy(o.direct)
	if err != nil {
		return nil, nil, "", err
	}
	o.base = direct
	return o.ctx, o.base, "", nil
}

// ReadRemote implements sumdb.ClientOps.
func (o *sumOps) ReadRemote(path string) ([]byte, error) {
	ctx, base, prefix, err := o.where()
	if err != nil {
		return nil, err
	}
	return base.read(ctx, strings.TrimPrefix(prefix+path, "/"), 1<<20)
}

// ReadConfig implements sumdb.ClientOps.
func (o *sumOps) ReadConfig(file string) ([]byte, error) {
	if file == "key" {
		return []byte(o.key), nil
	}
	b, err := os.ReadFile(o.file(file))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// WriteConfig implements sumdb.ClientOps.
func (o *sumOps) WriteConfig(file string, old, new []byte) error {
	have, err := o.ReadConfig(file)
	if err != nil {
		return err
	}
	if string(have) != string(old) {
		return sumdb.ErrWriteConflict
	}
	name := o.file(file)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return atomicfile.Write(name, new, 0o644)
}

// file maps a name of the client to a path; names come from the database's
// name and numbers, but nothing here depends on that.
func (o *sumOps) file(name string) string {
	return filepath.Join(o.dir, filepath.Clean("/"+name))
}

// ReadCache implements sumdb.ClientOps: a toolchain is looked up once, so
// there is no cache.
func (o *sumOps) ReadCache(string) ([]byte, error) { return nil, os.ErrNotExist }

// WriteCache implements sumdb.ClientOps.
func (o *sumOps) WriteCache(string, []byte) {}

// Log implements sumdb.ClientOps.
func (o *sumOps) Log(string) {}

// SecurityError implements sumdb.ClientOps. The lookup's own error follows it.
func (o *sumOps) SecurityError(string) {}
