package webhook

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/m3o/m3o"
)

// A Hook is one address that a forge sends to.
type Hook struct {
	ID       string
	Provider Provider
	Secret   m3o.Secret
}

// A Receiver answers deliveries at /hooks/<provider>/<id>: what is signed is
// in the queue, on disk, before it answers 202.
type Receiver struct {
	hook  func(ctx context.Context, id string) (Hook, bool)
	queue *Queue
	log   *slog.Logger
	// These bound the memory of all deliveries that are being read together.
	// Who sends large ones, or does not say how large, cannot keep the small out.
	small, large *semaphore.Weighted
}

const (
	maxSmall  = 1 << 20
	maxBodies = 64 << 20         // of each kind
	readTime  = 20 * time.Second // forges give up after ten
)

// NewReceiver makes a Receiver that finds hooks by hook.
func NewReceiver(hook func(ctx context.Context, id string) (Hook, bool), q *Queue, log *slog.Logger) *Receiver {
	return &Receiver{hook: hook, queue: q, log: log, small: semaphore.NewWeighted(maxBodies), large: semaphore.NewWeighted(maxBodies)}
}

// decoy is checked where there is no hook, so that the answer and its time
// are the same as for a wrong signature.
const decoy m3o.Secret = "whsec_ZGVjb3k="

func answer(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	_, _ = io.WriteString(w, text+"\n")
}

// ServeHTTP takes one delivery. Only a wrong signature and a broken body are
// 4xx: GitLab disables a hook that answers so to events we merely do not need.
func (rc *Receiver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	provider, id, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/hooks/"), "/")
	p := Provider(provider)
	if !ok || !p.Known() || strings.Contains(id, "/") || id == "" {
		answer(w, http.StatusNotFound, "no such hook: the address is /hooks/<forge>/<id>, as m3o repo:info shows it")
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		answer(w, http.StatusMethodNotAllowed, "forges POST here")
		return
	}
	body, release, err := rc.read(w, r)
	if err != nil {
		rc.refuse(w, err)
		return
	}
	defer release()
	hook, found := rc.hook(r.Context(), id)
	if !found || hook.Provider != p || hook.Secret == "" {
		found, hook.Secret = false, decoy
	}
	if err := Verify(p, r.Header, body, hook.Secret); err != nil || !found {
		rc.log.Info("delivery refused", "provider", provider, "hook", clip(id, 40), "remote", clip(r.Header.Get("X-Forwarded-For"), 60))
		answer(w, http.StatusUnauthorized, "no hook here, or not its signature")
		return
	}
	e, err := Parse(p, r.Header, body)
	if err != nil {
		rc.log.Warn("delivery not understood", "hook", hook.ID, "err", err)
		answer(w, http.StatusBadRequest, err.Error())
		return
	}
	switch err := rc.queue.Add(r.Context(), hook.ID, e); {
	case errors.Is(err, ErrDuplicate):
		answer(w, http.StatusAccepted, "received before")
	case err != nil:
		rc.refuse(w, err)
	default:
		answer(w, http.StatusAccepted, "queued")
	}
}

func (rc *Receiver) refuse(w http.ResponseWriter, err error) {
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &big):
		answer(w, http.StatusRequestEntityTooLarge, "deliveries have at most 25 MB")
	case m3o.KindOf(err) == m3o.Invalid:
		answer(w, http.StatusBadRequest, err.Error())
	default:
		w.Header().Set("Retry-After", "30")
		answer(w, http.StatusServiceUnavailable, "not taken; send it again later")
	}
}

// read reads the body when there is room for it among all that are read now.
func (rc *Receiver) read(w http.ResponseWriter, r *http.Request) (body []byte, release func(), err error) {
	size := r.ContentLength
	if size < 0 {
		size = MaxBody // chunked: it may be all of it
	}
	if size > MaxBody {
		return nil, nil, &http.MaxBytesError{Limit: MaxBody}
	}
	room := rc.small
	if size > maxSmall {
		room = rc.large
	}
	ctx, cancel := context.WithTimeout(r.Context(), readTime)
	defer cancel()
	if err := room.Acquire(ctx, size); err != nil {
		return nil, nil, &m3o.Error{Kind: m3o.Unavailable, Msg: "too many large deliveries at once", Err: err}
	}
	release = func() { room.Release(size) }
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTime)) // not every server has one
	body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if err == nil && r.ContentLength >= 0 && int64(len(body)) != r.ContentLength {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		release()
		var big *http.MaxBytesError
		if !errors.As(err, &big) {
			err = m3o.Errorf(m3o.Invalid, "the body ended early: %w", err)
		}
		return nil, nil, err
	}
	return body, release, nil
}
