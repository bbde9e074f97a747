//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// rollback measures m3o rollback.
func (b *bench) rollback(ctx context.Context, sec *section) error {
	c, err := b.newCheckout(ctx, samples[0], "bench-back")
	if err != nil {
		return err
	}
	var wants []string // of the two versions, the one that the next rollback leads to first
	for range 2 {
		if err := c.nextVersion(ctx); err != nil {
			return err
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		wants = append(wants, c.want)
	}
	if _, _, err := c.hostBuild(ctx, nil); err != nil {
		return err
	}
	var answer, wall, api, bare, ratio, whoami durations
	for round := range b.rounds {
		if err := b.settle(ctx, 1); err != nil {
			return err
		}
		back := func() error {
			began := time.Now()
			cmd := b.box.command(ctx, b.dir, b.box.m3o(), "rollback", "--json", "-a", c.app)
			var out, errOut strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &errOut
			if err := cmd.Start(); err != nil {
				return err
			}
			var werr error
			took := make(chan time.Duration, 1)
			go func() { werr = cmd.Wait(); took <- time.Since(began) }()
			aerr := until(ctx, pollEvery, time.Minute, "the old version to answer", func() (bool, error) {
				return c.answers(ctx, wants[round%2])
			})
			answer.add(time.Since(began))
			wall.add(<-took)
			if werr != nil {
				return fmt.Errorf("m3o rollback: %w: %s", werr, errOut.String())
			}
			if aerr != nil {
				return aerr
			}
			millis, err := rollbackMillis([]byte(out.String()))
			api.add(millis)
			return err
		}
		start := func() error {
			t, err := b.firstAnswer(ctx, c.binary())
			bare.add(t)
			return err
		}
		if err := inTurns(round, back, start); err != nil {
			return err
		}
		ratio.add(quotient(answer.last(), bare.last()))
		began := time.Now()
		if _, err := b.box.run(ctx, b.dir, b.box.m3o(), "whoami"); err != nil {
			return err
		}
		whoami.add(time.Since(began))
		b.say("rollback: answers after %s, the API says %s", secs(answer.last()), secs(api.last()))
	}
	sec.add(row{What: "`m3o rollback` → old version answers", Budget: "≤ 0.3 s", Measured: answer.text(), Reference: "the bare binary's first answer " + bare.text(),
		Ratio: times(ratio.median()), Met: verdict(answer.median() <= 300*time.Millisecond)})
	t := table{title: "Where the time goes", head: []string{"what", "median", "remark"}}
	t.add("**old version answers**", secs(answer.median()), "asked every 10 ms from the start on")
	t.add("`m3o rollback` has ended", secs(wall.median()), "")
	t.add("the API's own figure", secs(api.median()), "new release, new container, health check, switch")
	t.add("for comparison: `m3o whoami`", secs(whoami.median()), "the CLI's start, TLS and one authenticated call")
	t.add("for comparison: the binary on the host", secs(bare.median()), "fork, listen, first HTTP answer")
	sec.tables = append(sec.tables, t)
	sec.note("Two versions of hello-http, rolled back and forth. Each rollback starts a new container of the old image; nothing is kept running for it.")
	return b.destroy(ctx, c.app)
}

// rollbackMillis reads the duration from the answer of the API, in which a
// 64-bit number is a string (protobuf's JSON mapping).
func rollbackMillis(b []byte) (time.Duration, error) {
	var res struct {
		Millis int64 `json:"millis,string"`
	}
	if err := json.Unmarshal(b, &res); err != nil {
		return 0, fmt.Errorf("read answer of m3o rollback: %w", err)
	}
	return time.Duration(res.Millis) * time.Millisecond, nil
}

// firstAnswer starts a web server as a plain process and waits until it answers.
func (b *bench) firstAnswer(ctx context.Context, binary string) (time.Duration, error) {
	s, err := b.startBare(ctx, binary)
	if err != nil {
		return 0, err
	}
	s.stop()
	return s.took, nil
}
