//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// wakes is how often an app is woken for each round.
const wakes = 5

// wake measures the first answer of an app that sleeps.
func (b *bench) wake(ctx context.Context, sec *section) error {
	c, err := b.newCheckout(ctx, samples[0], "bench-wake")
	if err != nil {
		return err
	}
	if err := c.nextVersion(ctx); err != nil {
		return err
	}
	if _, err := c.measurePush(ctx, c.want); err != nil {
		return err
	}
	if _, _, err := c.hostBuild(ctx, nil); err != nil {
		return err
	}
	if _, err := b.box.run(ctx, b.dir, b.box.m3o(), "ps:sleep", "--after", "1s", "-a", c.app); err != nil {
		return err
	}
	var first, again, bare durations
	for range b.rounds * wakes {
		if err := until(ctx, 50*time.Millisecond, time.Minute, "the app to sleep", func() (bool, error) {
			out, err := b.box.run(ctx, b.dir, b.box.m3o(), "ps:scale", "-a", c.app)
			return strings.Contains(out, "asleep"), err
		}); err != nil {
			return err
		}
		for _, d := range []*durations{&first, &again} {
			began := time.Now()
			ok, err := c.answers(ctx, c.want)
			if err != nil {
				return fmt.Errorf("wake: %w", err)
			}
			if !ok {
				return errors.New("the woken app answers something else")
			}
			d.add(time.Since(began))
		}
		t, err := b.firstAnswer(ctx, c.binary())
		if err != nil {
			return err
		}
		bare.add(t)
		b.say("wake: first answer after %s, the next after %s", secs(first.last()), secs(again.last()))
	}
	s := slices.Sorted(slices.Values(first))
	p99 := s[len(s)*99/100]
	sec.add(row{What: "first answer of a sleeping app, p99", Budget: "≤ 0.15 s", Measured: secs(p99) + ", median " + secs(first.median()),
		Reference: "the bare binary's first answer " + bare.text(), Ratio: times(quotient(first.median(), bare.median())), Met: verdict(p99 <= 150*time.Millisecond)})
	sec.note(fmt.Sprintf("hello-http, %d times; the answer of the app once awake takes %s. A new TLS connection each.", len(first), again.text()))
	return b.destroy(ctx, c.app)
}
