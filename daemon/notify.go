package daemon

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/events"
	"github.com/m3o/m3o/store"
)

// A notifier is one URL that is told of an app's events. The URL is a secret
// too: that of a chat is all it takes to post there.
type notifier struct {
	App, ID  string
	URL      config.Sealed
	Shown    string // of the URL
	Format   string
	Events   []string
	Secret   config.Sealed // of format webhook
	User     string
	Created  time.Time
	Disabled string // why nothing is sent any more
}

func (n notifier) key() string   { return n.App + "/" + n.ID }
func (n notifier) where() string { return "notifier " + n.key() }

// The statuses of a delivery.
const (
	toDeliver   = "pending"
	delivered   = "delivered"
	undelivered = "failed"
)

// A delivery is one event on its way to one notifier.
type delivery struct {
	App, Notifier string
	Event         events.Event
	Status        string
	Attempts      int
	Detail        string
	Created       time.Time
	Last, Next    time.Time
}

func (x delivery) key() string { return x.App + "/" + x.Notifier + "/" + x.Event.ID }

const (
	maxNotifiers   = 20 // of an app
	keepDeliveries = 50 // of a notifier, beside those that are pending
	maxPending     = 500
	attemptTime    = 15 * time.Second
	atOnce         = 8 // deliveries under way
)

// backOff is how long after each failed attempt the next one comes, as
// standardwebhooks.com advises; after the last the delivery has failed.
var backOff = []time.Duration{5 * time.Second, time.Minute, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 5 * time.Hour, 10 * time.Hour}

// notifications sends what happens to apps to whom it may concern. An event is
// in the log before anything is sent, and a delivery in the store before its
// first attempt, so that a restart of the daemon loses neither.
type notifications struct {
	d          *Daemon
	table      *store.Bucket[notifier] // by app/id
	deliveries *store.Bucket[delivery] // by app/id/event
	client     *http.Client
	wake       chan struct{} // holds one token when a delivery may be due

	mu   sync.Mutex      // guards busy
	busy map[string]bool // notifiers that a delivery is under way to
}

func openNotifications(ctx context.Context, d *Daemon) (*notifications, error) {
	n := &notifications{d: d, wake: make(chan struct{}, 1), busy: map[string]bool{}, client: outsideClient(d.cfg.NotifyPrivate)}
	var err error
	if n.table, err = store.NewBucket[notifier](ctx, d.store, "notifiers"); err != nil {
		return nil, err
	}
	n.deliveries, err = store.NewBucket[delivery](ctx, d.store, "notify-deliveries")
	return n, err
}

// run hands events to notifiers until ctx ends.
func (n *notifications) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { _ = n.d.bus.Consume(ctx, "notifications", n.enqueue) })
	slots := make(chan struct{}, atOnce)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-n.wake:
		}
		due, next, err := n.due(ctx, time.Now())
		if err != nil {
			n.d.log.Error("read notifications", "err", err)
			next = time.Minute
		}
		for _, x := range due {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			wg.Go(func() {
				defer func() {
					<-slots
					n.release(x)
					n.poke()
				}()
				n.attempt(ctx, x)
			})
		}
		timer.Reset(next)
	}
}

func (n *notifications) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// due takes the oldest due delivery of each notifier that is not busy, and
// says when to look again.
func (n *notifications) due(ctx context.Context, now time.Time) ([]delivery, time.Duration, error) {
	all, err := n.deliveries.List(ctx, "")
	if err != nil {
		return nil, 0, err
	}
	pending := make([]delivery, 0, len(all))
	for _, e := range all {
		if e.Value.Status == toDeliver {
			pending = append(pending, e.Value)
		}
	}
	slices.SortStableFunc(pending, func(a, b delivery) int { return a.Created.Compare(b.Created) })
	next := time.Hour
	var due []delivery
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, x := range pending {
		to := x.App + "/" + x.Notifier
		switch {
		case n.busy[to]:
		case x.Next.After(now):
			next = min(next, x.Next.Sub(now))
		default:
			n.busy[to] = true
			due = append(due, x)
		}
	}
	return due, next, nil
}

func (n *notifications) release(x delivery) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.busy, x.App+"/"+x.Notifier)
}

// enqueue makes a delivery of an event for each notifier that wants it. It may
// be called again for the same event.
func (n *notifications) enqueue(ctx context.Context, e events.Event) error {
	all, err := n.table.List(ctx, e.App+"/")
	if err != nil {
		return err
	}
	for _, to := range all {
		if to.Value.Disabled != "" || !wants(to.Value.Events, e) {
			continue
		}
		old, err := n.deliveries.List(ctx, to.Key+"/")
		if err != nil {
			return err
		}
		if len(old) >= maxPending {
			n.d.log.Warn("notification dropped: too many wait", "app", e.App)
			continue
		}
		now := time.Now().UTC()
		x := delivery{App: e.App, Notifier: to.Value.ID, Event: e, Status: toDeliver, Created: now, Next: now}
		if _, err := n.deliveries.Create(ctx, x.key(), x); err != nil && m3o.KindOf(err) != m3o.Conflict {
			return err
		}
		n.prune(ctx, old)
	}
	n.poke()
	return nil
}

// prune forgets the oldest deliveries that have ended.
func (n *notifications) prune(ctx context.Context, all []store.Entry[delivery]) {
	ended := slices.DeleteFunc(all, func(e store.Entry[delivery]) bool { return e.Value.Status == toDeliver })
	slices.SortFunc(ended, func(a, b store.Entry[delivery]) int { return b.Value.Created.Compare(a.Value.Created) })
	for _, e := range ended[min(len(ended), keepDeliveries):] {
		if err := n.deliveries.Delete(ctx, e.Key, 0); err != nil {
			n.d.log.Warn("forget an old notification", "app", e.Value.App, "err", err)
		}
	}
}

// attempt tries a delivery once and records how it went.
func (n *notifications) attempt(ctx context.Context, x delivery) {
	to, rev, err := n.table.Get(ctx, x.App+"/"+x.Notifier)
	if m3o.KindOf(err) == m3o.NotFound {
		x.Status, x.Detail = undelivered, "the notifier was removed"
	} else if err != nil {
		n.d.log.Error("read notifier", "app", x.App, "err", err)
		pause(ctx, time.Second) // it stays due
		return
	} else {
		code, err := n.send(ctx, to, x.Event)
		if ctx.Err() != nil {
			return // the next start of the daemon tries again
		}
		x = x.after(code, err, time.Now().UTC())
		if code == http.StatusGone && to.Disabled == "" {
			to.Disabled = "it answered 410 Gone"
			if _, err := n.table.Update(ctx, to.key(), to, rev); err != nil {
				n.d.log.Warn("disable notifier", "app", x.App, "err", err)
			}
		}
	}
	if _, err := n.deliveries.Put(ctx, x.key(), x); err != nil {
		n.d.log.Error("record notification", "app", x.App, "err", err)
		pause(ctx, time.Second)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// after is the delivery after an attempt that was answered with code or failed
// with err.
func (x delivery) after(code int, err error, now time.Time) delivery {
	x.Attempts++
	x.Last, x.Next = now, time.Time{}
	switch {
	case err == nil && code >= 200 && code < 300:
		x.Status, x.Detail = delivered, fmt.Sprintf("answered %d", code)
		return x
	case err != nil:
		x.Detail = clip(strings.ToValidUTF8(err.Error(), "?"), 300)
	default:
		x.Detail = fmt.Sprintf("answered %d", code)
	}
	if code == http.StatusGone || m3o.KindOf(err) == m3o.Denied || x.Attempts > len(backOff) {
		x.Status = undelivered
		return x
	}
	x.Next = now.Add(backOff[x.Attempts-1])
	return x
}

// send makes one request. The answer's body is read to keep the connection
// and thrown away: it is from outside.
func (n *notifications) send(ctx context.Context, to notifier, e events.Event) (code int, err error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	target, err := n.d.config.Unseal(to.URL, to.where()+" url")
	if err != nil {
		return 0, fmt.Errorf("open URL: %w", err)
	}
	body, err := payload(to.Format, e)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target.Reveal(), bytes.NewReader(body))
	if err != nil {
		return 0, errors.New("the URL does not parse")
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "m3o/"+n.d.version)
	if to.Format == formatWebhook {
		secret, err := n.d.config.Unseal(to.Secret, to.where()+" secret")
		if err != nil {
			return 0, fmt.Errorf("open signing secret: %w", err)
		}
		if err := sign(req.Header, secret, e.ID, time.Now(), body); err != nil {
			return 0, err
		}
	}
	res, err := n.client.Do(req)
	if err != nil {
		return 0, outsideError(err)
	}
	defer res.Body.Close()                                       //nolint:errcheck // only read
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10)) // what it says does not matter
	return res.StatusCode, nil
}

// add checks and makes a notifier; secret is what its webhooks are signed with.
func (n *notifications) add(ctx context.Context, rec notifier, target m3o.Secret) (_ notifier, secret m3o.Secret, err error) {
	bad := func(hint, format string, args ...any) (notifier, m3o.Secret, error) {
		return rec, "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf(format, args...), Hint: hint}
	}
	u, err := url.Parse(target.Reveal())
	switch {
	case len(target) > 2000:
		return bad("", "the URL is longer than 2,000 bytes")
	case err != nil || u.Host == "" || u.Opaque != "":
		return bad("write it whole, such as https://example.com/hooks/m3o", "that is no URL")
	case u.Scheme != "https" && !(u.Scheme == "http" && n.d.cfg.NotifyPrivate):
		return bad("use https://", "the URL begins with %q, not https:", u.Scheme+":")
	case u.User != nil:
		return bad("webhooks are signed, so it needs no password", "the URL has a user name in it")
	case u.Fragment != "":
		return bad("leave out what follows #", "the URL has a fragment, which no server sees")
	}
	if err := n.allowed(ctx, u); err != nil {
		return rec, "", err
	}
	if rec.Format == "" {
		rec.Format = guessFormat(u)
	}
	if !slices.Contains([]string{formatWebhook, formatSlack, formatDiscord}, rec.Format) {
		return bad("it is webhook, slack or discord", "there is no format %q", rec.Format)
	}
	if len(rec.Events) == 0 {
		rec.Events = []string{"live", "failed", "recovered", "crashed"}
	}
	for _, e := range rec.Events {
		if !slices.Contains(eventNames, e) {
			return bad("they are "+strings.Join(eventNames, ", "), "there is no event %q", e)
		}
	}
	slices.Sort(rec.Events)
	rec.Events = slices.Compact(rec.Events)
	have, err := n.table.List(ctx, rec.App+"/")
	if err != nil {
		return rec, "", err
	}
	if len(have) >= maxNotifiers {
		return rec, "", &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has %d notifiers already, which is the limit", rec.App, len(have)), Hint: "m3o notify:remove ID"}
	}
	rec.ID, rec.Created, rec.Shown = randomID(), time.Now().UTC(), shownURL(u)
	rec.URL = n.d.config.Seal(target, rec.where()+" url")
	if rec.Format == formatWebhook {
		key := make([]byte, 32)
		if _, err := rand.Read(key); err != nil {
			return rec, "", fmt.Errorf("make signing secret: %w", err)
		}
		secret = m3o.Secret(secretPrefix + base64.StdEncoding.EncodeToString(key))
		rec.Secret = n.d.config.Seal(secret, rec.where()+" secret")
	}
	_, err = n.table.Create(ctx, rec.key(), rec)
	return rec, secret, err
}

// shownURL is a URL without what may be its password.
func shownURL(u *url.URL) string {
	s := u.Scheme + "://" + u.Host
	if p := strings.Trim(u.Path, "/"); p != "" || u.RawQuery != "" {
		first, _, more := strings.Cut(p, "/")
		if more && len(first) <= 12 {
			s += "/" + first
		}
		s += "/…"
	}
	return s
}

func (n *notifications) get(ctx context.Context, app, id string) (notifier, error) {
	rec, _, err := n.table.Get(ctx, app+"/"+id)
	if m3o.KindOf(err) == m3o.NotFound || id == "" {
		err = &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no notifier %q", app, id), Hint: "m3o notify -a " + app, Err: err}
	}
	return rec, err
}

func (n *notifications) list(ctx context.Context, app string) ([]notifier, error) {
	all, err := n.table.List(ctx, app+"/")
	if err != nil {
		return nil, err
	}
	out := make([]notifier, len(all))
	for i, e := range all {
		out[i] = e.Value
	}
	slices.SortFunc(out, func(a, b notifier) int { return a.Created.Compare(b.Created) })
	return out, nil
}

// remove takes a notifier away with its history.
func (n *notifications) remove(ctx context.Context, app, id string) error {
	rec, err := n.get(ctx, app, id)
	if err != nil {
		return err
	}
	if err := n.table.Delete(ctx, rec.key(), 0); err != nil {
		return err
	}
	old, err := n.deliveries.List(ctx, rec.key()+"/")
	for _, e := range old {
		err = errors.Join(err, n.deliveries.Delete(ctx, e.Key, 0))
	}
	return err
}

func (n *notifications) removeApp(ctx context.Context, app string) error {
	all, err := n.list(ctx, app)
	for _, rec := range all {
		err = errors.Join(err, n.remove(ctx, app, rec.ID))
	}
	return err
}

// test sends one notification now, without the queue.
func (n *notifications) test(ctx context.Context, app, id, user string) (delivery, error) {
	rec, err := n.get(ctx, app, id)
	if err != nil {
		return delivery{}, err
	}
	data, err := json.Marshal(appEvent{App: app, URL: n.d.url(app), User: user})
	if err != nil {
		return delivery{}, fmt.Errorf("encode test: %w", err)
	}
	now := time.Now().UTC()
	x := delivery{App: app, Notifier: id, Created: now, Event: events.Event{ID: events.NewID(), Type: "test", App: app, Time: now, Data: data}}
	code, err := n.send(ctx, rec, x.Event)
	x = x.after(code, err, time.Now().UTC())
	if x.Status != delivered { // a test is not tried again
		x.Status, x.Next = undelivered, time.Time{}
	}
	_, err = n.deliveries.Put(ctx, x.key(), x)
	return x, err
}

// history is the newest deliveries of one notifier or all of an app, newest first.
func (n *notifications) history(ctx context.Context, app, id string, limit int) ([]delivery, error) {
	prefix := app + "/"
	if id != "" {
		if _, err := n.get(ctx, app, id); err != nil {
			return nil, err
		}
		prefix += id + "/"
	}
	all, err := n.deliveries.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := make([]delivery, len(all))
	for i, e := range all {
		out[i] = e.Value
	}
	slices.SortStableFunc(out, func(a, b delivery) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.Notifier, b.Notifier))
	})
	return out[:min(limit, len(out))], nil
}
