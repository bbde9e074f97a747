package daemon

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// hookPath is where deploy hooks are called at, with their secret after it.
const hookPath = "/hooks/deploy/"

// A deployHook is a secret URL that deploys a branch. Only the hash of the
// secret is kept: it is the record's key.
type deployHook struct {
	App, ID string
	Name    string
	Branch  string // "" when the caller may name one
	User    string
	Created time.Time
	Used    time.Time
	Uses    int
}

const maxHooks = 50 // of an app

// deployHooks keeps them and takes their calls.
type deployHooks struct {
	d     *Daemon
	table *store.Bucket[deployHook] // by the hash of the secret

	mu      sync.Mutex        // guards running
	running map[string]string // app to the commit that a hook has building
}

func openDeployHooks(ctx context.Context, d *Daemon) (*deployHooks, error) {
	t, err := store.NewBucket[deployHook](ctx, d.store, "deploy-hooks")
	return &deployHooks{d: d, table: t, running: map[string]string{}}, err
}

func hookKey(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

func (h *deployHooks) all(ctx context.Context, app string) ([]store.Entry[deployHook], error) {
	all, err := h.table.List(ctx, "")
	return slices.DeleteFunc(all, func(e store.Entry[deployHook]) bool { return e.Value.App != app }), err
}

func (h *deployHooks) list(ctx context.Context, app string) ([]deployHook, error) {
	all, err := h.all(ctx, app)
	if err != nil {
		return nil, err
	}
	out := make([]deployHook, len(all))
	for i, e := range all {
		out[i] = e.Value
	}
	slices.SortFunc(out, func(a, b deployHook) int { return a.Created.Compare(b.Created) })
	return out, nil
}

func (h *deployHooks) add(ctx context.Context, rec deployHook) (deployHook, m3o.Secret, error) {
	have, err := h.all(ctx, rec.App)
	if err != nil {
		return rec, "", err
	}
	if len(have) >= maxHooks {
		return rec, "", &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has %d deploy hooks already, which is the limit", rec.App, len(have)), Hint: "m3o deploy-hooks:remove ID"}
	}
	secret := rand.Text() + rand.Text() // 260 bits
	rec.ID, rec.Created = randomID(), time.Now().UTC()
	_, err = h.table.Create(ctx, hookKey(secret), rec)
	return rec, m3o.Secret(secret), err
}

// remove takes a hook away by its id or name.
func (h *deployHooks) remove(ctx context.Context, app, id string) error {
	all, err := h.all(ctx, app)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(e store.Entry[deployHook]) bool { return id != "" && (e.Value.ID == id || e.Value.Name == id) })
	if i < 0 {
		return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no deploy hook %q", app, id), Hint: "m3o deploy-hooks -a " + app}
	}
	return h.table.Delete(ctx, all[i].Key, 0)
}

func (h *deployHooks) removeApp(ctx context.Context, app string) error {
	all, err := h.all(ctx, app)
	for _, e := range all {
		err = errors.Join(err, h.table.Delete(ctx, e.Key, 0))
	}
	return err
}

// ServeHTTP takes POST /hooks/deploy/SECRET, answers at once and deploys in the
// background. An unknown secret is answered like a path that is not there. GET
// does nothing: whoever previews links in a chat must not deploy.
func (h *deployHooks) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	secret := strings.TrimPrefix(r.URL.Path, hookPath)
	rec, rev, err := h.table.Get(r.Context(), hookKey(secret))
	switch {
	case m3o.KindOf(err) == m3o.NotFound:
		h.answer(w, http.StatusNotFound, map[string]string{"error": "there is no such deploy hook"})
		return
	case err != nil:
		h.d.log.Error("read deploy hook", "err", err)
		h.answer(w, http.StatusServiceUnavailable, map[string]string{"error": "try again later"})
		return
	case r.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		h.answer(w, http.StatusMethodNotAllowed, map[string]string{"error": "a deploy hook is called by POST"})
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	src, err := h.source(ctx, rec, r.URL.Query().Get("branch"))
	if err != nil {
		code := http.StatusInternalServerError
		switch m3o.KindOf(err) {
		case m3o.Denied:
			code = http.StatusForbidden
		case m3o.NotFound, m3o.Invalid, m3o.Conflict:
			code = http.StatusUnprocessableEntity
		case m3o.Unavailable:
			code = http.StatusServiceUnavailable
		default:
			h.d.log.Error("deploy hook", "app", rec.App, "err", err)
		}
		h.answer(w, code, map[string]string{"error": userMessage(err)})
		return
	}
	rec.Used, rec.Uses = time.Now().UTC(), rec.Uses+1
	// Another call at the same time may count in its place: it is no ledger.
	if _, err := h.table.Update(ctx, hookKey(secret), rec, rev); err != nil && m3o.KindOf(err) != m3o.Conflict {
		h.d.log.Warn("count use of deploy hook", "app", rec.App, "err", err)
	}
	state := "building"
	if !h.start(src) {
		state = "building already"
	}
	h.answer(w, http.StatusAccepted, map[string]string{"app": rec.App, "commit": src.Commit, "status": state})
}

func (h *deployHooks) answer(w http.ResponseWriter, code int, body map[string]string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // the client may be gone
}

// source is what a call of the hook deploys.
func (h *deployHooks) source(ctx context.Context, rec deployHook, branch string) (m3o.Source, error) {
	app, err := h.d.ledger.App(ctx, rec.App)
	if err != nil {
		return m3o.Source{}, err
	}
	switch {
	case rec.Branch == "" && branch == "":
		branch = app.DeployBranch()
	case branch == "":
		branch = rec.Branch
	case rec.Branch != "" && branch != rec.Branch:
		return m3o.Source{}, m3o.Errorf(m3o.Denied, "this hook deploys the branch %s only", rec.Branch)
	}
	via := "deploy hook"
	if rec.Name != "" {
		via += " " + rec.Name
	}
	if branch != app.DeployBranch() {
		via += " of " + branch
	}
	return h.d.tipSource(ctx, app, branch, rec.User, via)
}

// start deploys in the background unless that very commit is being built for
// a hook already: a hook that is called again and again must not keep
// replacing its own build. A newer commit replaces it, as a push would.
func (h *deployHooks) start(src m3o.Source) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running[src.App] == src.Commit {
		return false
	}
	h.running[src.App] = src.Commit
	h.d.background(func(ctx context.Context) {
		defer func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.running[src.App] == src.Commit {
				delete(h.running, src.App)
			}
		}()
		// Its output is in the build's log, and its end in the ledger.
		if _, err := h.d.deployCommit(ctx, src, io.Discard); err != nil {
			h.d.log.Info("deploy by hook failed", "app", src.App, "err", err)
		}
	})
	return true
}
