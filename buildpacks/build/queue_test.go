package build

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
)

func TestQueueIsFairToUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := &queue{free: 1}
		first, err := q.enter(t.Context(), "ada", nil)
		if err != nil {
			t.Fatal(err)
		}
		turns := make(chan string)
		begin := func(user string) {
			go func() {
				done, err := q.enter(t.Context(), user, func(int) {})
				if err != nil {
					t.Error(err)
					return
				}
				turns <- user
				done()
			}()
			synctest.Wait() // the order of arrival is part of the test
		}
		for user := range strings.FieldsSeq("ada ada ada bob carl bob") {
			begin(user)
		}
		gone, cancel := context.WithCancelCause(t.Context())
		why := errors.New("cancelled")
		ended := make(chan error)
		go func() {
			_, err := q.enter(gone, "dora", func(ahead int) {
				if ahead != 7 {
					t.Errorf("%d before it, want 7", ahead)
				}
			})
			ended <- err
		}()
		synctest.Wait()
		cancel(why)
		if err := <-ended; !errors.Is(err, why) {
			t.Errorf("a cancelled wait ended with %v", err)
		}
		first()
		var got []string
		for range 6 {
			got = append(got, <-turns)
		}
		if s := strings.Join(got, " "); s != "bob carl ada bob ada ada" {
			t.Errorf("order %s", s)
		}
		synctest.Wait()
		if q.free != 1 || len(q.running) != 0 || len(q.waiting) != 0 {
			t.Errorf("left %+v", q)
		}
	})
}
