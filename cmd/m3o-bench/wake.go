//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// wakes is how often an app is woken for each round.
const wakes = 8

// padding makes the app's binary one of 20 MB.
const padding = 14 << 20

// pad adds data to an app that its program carries along.
func pad(c *checkout) error {
	data := make([]byte, padding)
	if _, err := rand.NewChaCha8([32]byte{}).Read(data); err != nil {
		return err
	}
	for _, dir := range []string{c.repo, c.host} {
		if err := os.WriteFile(filepath.Join(dir, "padding.bin"), data, 0o644); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "padding.go"), []byte(padder), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// padder looks at a byte, or the linker would leave the data out.
const padder = `package main

import (
	_ "embed"
	"log"
)

//go:embed padding.bin
var padding []byte

func init() { log.Printf("padded by %d bytes, the first is %d", len(padding), padding[0]) }
`

// wake measures the first answer of an app that sleeps.
func (b *bench) wake(ctx context.Context, sec *section) error {
	c, err := b.newCheckout(ctx, samples[0], "bench-wake")
	if err != nil {
		return err
	}
	if err := pad(c); err != nil {
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
	sec.note(fmt.Sprintf("hello-http with 14 MB of data in it, a binary of 20 MB, %d times; the answer of the app once awake takes %s. A new TLS connection each.", len(first), again.text()))
	return b.destroy(ctx, c.app)
}
