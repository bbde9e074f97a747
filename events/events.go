// Package events tells what has happened, for whoever wants to know later:
// envelopes under subjects, in a log that outlives the daemon, and consumers
// that miss none of them.
//
// It must not know who listens, nor why. The log and the place where a
// consumer's position is kept are given to it.
package events

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// An Event is one thing that has happened to an app.
type Event struct {
	ID   string // unique; the same however often it is handed out
	Type string // "deploy.live", "app.crashed" …
	App  string
	Time time.Time       // UTC
	Data json.RawMessage `json:",omitempty"` // what Type says it is
}

// Subject is where the event is in the log: the app, then the type.
func (e Event) Subject() string { return e.App + "/" + e.Type }

// A Log keeps records in their order. It must be safe for concurrent use.
type Log interface {
	// Append adds one record; it is kept once Append returns.
	Append(ctx context.Context, subject string, data []byte) (uint64, error)

	// Follow hands each record from number from on to each, in order, and goes
	// on with new ones until ctx ends, which is no error, or each fails.
	Follow(ctx context.Context, from uint64, each func(seq uint64, data []byte) error) error

	// Last is the number of the newest record, 0 for none.
	Last(ctx context.Context) (uint64, error)
}

// Positions keeps how far each consumer has come.
type Positions interface {
	// Position is the number of the last record the consumer has dealt with;
	// ok is false for one that is new.
	Position(ctx context.Context, consumer string) (seq uint64, ok bool, err error)
	SetPosition(ctx context.Context, consumer string, seq uint64) error
}

// A Bus publishes and consumes events. It is safe for concurrent use.
type Bus struct {
	log  Log
	pos  Positions
	slog *slog.Logger
}

// New makes a Bus on a log.
func New(log Log, pos Positions, l *slog.Logger) *Bus {
	if l == nil {
		l = slog.New(slog.DiscardHandler)
	}
	return &Bus{log: log, pos: pos, slog: l}
}

// NewID is an ID for an event.
func NewID() string { return "evt_" + rand.Text() }

// Publish appends e; ID and Time are set unless they are.
func (b *Bus) Publish(ctx context.Context, e Event) error {
	if e.ID == "" {
		e.ID = NewID()
	}
	if e.Time.IsZero() {
		e.Time = time.Now().UTC()
	}
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event %s: %w", e.Type, err)
	}
	if _, err := b.log.Append(ctx, e.Subject(), data); err != nil {
		return fmt.Errorf("publish %s of %s: %w", e.Type, e.App, err)
	}
	return nil
}

// Consume hands every event to handle, in order and at least once, until ctx
// ends: the position is kept under the consumer's name, so it goes on where it
// stopped. A new consumer begins with what happens from now on. An event whose
// handling fails is tried again, with growing pauses, and holds up what follows;
// handle gives up on what will never work by returning nil.
func (b *Bus) Consume(ctx context.Context, consumer string, handle func(context.Context, Event) error) error {
	pause := firstPause
	for ctx.Err() == nil {
		err := b.consume(ctx, consumer, func(ctx context.Context, e Event) error {
			err := handle(ctx, e)
			if err == nil {
				pause = firstPause
			}
			return err
		})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			b.slog.Warn("event is handled again later", "consumer", consumer, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, longPause)
	}
	return nil
}

const (
	firstPause = 200 * time.Millisecond
	longPause  = time.Minute
)

func (b *Bus) consume(ctx context.Context, consumer string, handle func(context.Context, Event) error) error {
	seq, ok, err := b.pos.Position(ctx, consumer)
	if err != nil {
		return err
	}
	if !ok {
		if seq, err = b.log.Last(ctx); err != nil {
			return err
		}
		if err := b.pos.SetPosition(ctx, consumer, seq); err != nil {
			return err
		}
	}
	return b.log.Follow(ctx, seq+1, func(seq uint64, data []byte) error {
		var e Event
		if err := json.Unmarshal(data, &e); err != nil {
			// It was not written by Publish; nothing will make it readable.
			b.slog.Error("event does not decode", "consumer", consumer, "err", err)
		} else if err := handle(ctx, e); err != nil {
			return errors.Join(fmt.Errorf("handle %s of %s: %w", e.Type, e.App, err))
		}
		return b.pos.SetPosition(ctx, consumer, seq)
	})
}
