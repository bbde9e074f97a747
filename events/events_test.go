package events

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// memory is a Log and Positions that outlive a Bus.
type memory struct {
	mu      sync.Mutex
	records [][]byte
	more    chan struct{} // closed when a record is added
	at      map[string]uint64
}

func newMemory() *memory { return &memory{more: make(chan struct{}), at: map[string]uint64{}} }

func (m *memory) Append(_ context.Context, _ string, data []byte) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.records = append(m.records, data)
	close(m.more)
	m.more = make(chan struct{})
	return uint64(len(m.records)), nil
}

func (m *memory) Last(context.Context) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return uint64(len(m.records)), nil
}

func (m *memory) Follow(ctx context.Context, from uint64, each func(uint64, []byte) error) error {
	for n := from; ; n++ {
		m.mu.Lock()
		var data []byte
		more := m.more
		if int(n) <= len(m.records) {
			data = m.records[n-1]
		}
		m.mu.Unlock()
		if data == nil {
			select {
			case <-ctx.Done():
				return nil
			case <-more:
			}
			n--
			continue
		}
		if err := each(n, data); err != nil {
			return err
		}
	}
}

func (m *memory) Position(_ context.Context, c string) (uint64, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	seq, ok := m.at[c]
	return seq, ok, nil
}

func (m *memory) SetPosition(_ context.Context, c string, seq uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at[c] = seq
	return nil
}

func TestConsumerMissesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		publish := func(kind string) {
			if err := New(m, m, nil).Publish(t.Context(), Event{Type: kind, App: "hello"}); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		fails := 2
		run := func() (stop func()) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = New(m, m, nil).Consume(ctx, "test", func(_ context.Context, e Event) error {
					if e.Type == "hard" && fails > 0 {
						fails--
						return errors.New("not now")
					}
					if e.ID == "" || e.Time.IsZero() || e.App != "hello" {
						t.Errorf("event is %+v", e)
					}
					got = append(got, e.Type)
					return nil
				})
			}()
			return func() { cancel(); <-done }
		}
		publish("before")
		stop := run()
		synctest.Wait()
		publish("one")
		synctest.Wait()
		stop()
		publish("away")
		publish("hard")
		if _, err := m.Append(t.Context(), "", []byte("{")); err != nil {
			t.Fatal(err)
		}
		publish("last")
		stop = run()
		time.Sleep(time.Minute) // of the test's clock: past every pause
		synctest.Wait()
		stop()
		want := []string{"one", "away", "hard", "last"}
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}
