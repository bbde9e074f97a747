//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"time"
)

// change measures a one-line change of each sample against go build.
func (b *bench) change(ctx context.Context, sec *section) error {
	for _, s := range samples {
		if err := b.changeOf(ctx, s, sec); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	sec.note("The clock runs from the start of `git push` until the new version answers over HTTPS, asked every 10 ms. The reference is " +
		"`CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags \"-s -w\"` of the same tree on this machine with a warm cache of its own; it neither " +
		"transfers, nor packs an image, nor starts anything. Both change the same line of main.go, in turns, each round another one first.")
	sec.note("Builds have less CPU weight than anything else on the machine, apps above all. On a busy machine a plain `go build` is therefore " +
		"served before a push's, so it is measured a second time inside a cgroup of the builds' weight: the last ratio below is what m3o adds, whatever else runs.")
	return nil
}

func (b *bench) changeOf(ctx context.Context, s sample, sec *section) error {
	c, err := b.newCheckout(ctx, s, "bench-"+s.name)
	if err != nil {
		return err
	}
	group, err := b.newTame()
	if err != nil {
		b.say("no reference at the builds' CPU weight: %v", err)
	} else {
		defer group.remove()
	}
	// All caches are filled by a first build, and warm after a second one.
	for range 2 {
		if _, _, err := c.hostBuild(ctx, nil); err != nil {
			return err
		}
		if group != nil {
			if _, _, err := c.hostBuild(ctx, group); err != nil {
				return err
			}
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		if err := c.nextVersion(ctx); err != nil {
			return err
		}
	}
	var answer, wall, host, tamed, ratio, tameRatio, over, rest, shake, client, hostCPU durations
	var server usages
	var parts breakdown
	for round := range b.rounds {
		build := func() error {
			if err := b.settle(ctx, 1); err != nil {
				return err
			}
			w, cpu, err := c.hostBuild(ctx, nil)
			if err != nil {
				return err
			}
			host.add(w)
			hostCPU.add(cpu)
			if group != nil {
				w, _, err = c.hostBuild(ctx, group)
				tamed.add(w)
			}
			return err
		}
		push := func() error {
			if err := b.settle(ctx, 1); err != nil {
				return err
			}
			p, err := c.measurePush(ctx, c.want)
			answer.add(p.answer)
			wall.add(p.wall)
			client.add(p.client)
			server.add(p.server)
			parts.add(spans(p.lines, p.wall))
			return err
		}
		if err := inTurns(round, build, push); err != nil {
			return err
		}
		h, err := b.handshake(ctx, b.box.remote(c.app))
		if err != nil {
			return err
		}
		shake.add(h)
		a, g := answer.last(), host.last()
		ratio.add(quotient(a, g))
		over.add(a - g*3/2 - 500*time.Millisecond)
		rest.add(a - g)
		if group != nil {
			tameRatio.add(quotient(a, tamed.last()))
		}
		b.say("%s: answers after %s, go build %s, at the builds' weight %s", s.name, secs(a), secs(g), tamed.text())
		if err := c.nextVersion(ctx); err != nil {
			return err
		}
	}
	sec.add(row{What: s.name + ": one-line change, push → answers", Budget: "≤ 1.5× + 0.5 s", Measured: answer.text(),
		Reference: "go build " + host.text(), Ratio: times(ratio.median()) + ", " + secs(rest.median()) + " more", Met: verdict(over.median() <= 0)})
	t := parts.table(s.name + ": where the time goes")
	t.add("**new version answers**", secs(answer.median()), "counted from the start, as all below")
	t.add("git push has ended", secs(wall.median()), "")
	t.add("for comparison: `git ls-remote`", secs(shake.median()), "ssh connection, handshake and ref list only")
	t.add("CPU of git and ssh", secs(client.median()), client.span())
	server.rows(&t)
	t.add("`go build` alone", secs(host.median()), "CPU "+secs(hostCPU.median()))
	if group != nil {
		t.add("`go build` alone, at the builds' CPU weight", secs(tamed.median()), fmt.Sprintf("%s; the push is %s of it", tamed.span(), times(tameRatio.median())))
	}
	sec.tables = append(sec.tables, t)
	return b.destroy(ctx, c.app)
}

// inTurns runs both, in each round another one first.
func inTurns(round int, a, b func() error) error {
	if round%2 == 1 {
		a, b = b, a
	}
	if err := a(); err != nil {
		return err
	}
	return b()
}

// unchanged measures pushes that build nothing new.
func (b *bench) unchanged(ctx context.Context, sec *section) error {
	c, err := b.newCheckout(ctx, samples[0], "bench-same")
	if err != nil {
		return err
	}
	for range 2 {
		if _, _, err := c.hostBuild(ctx, nil); err != nil {
			return err
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		if err := c.commit(ctx); err != nil {
			return err
		}
	}
	var plain, forced, host, linked, ratio, fratio durations
	var parts, fparts breakdown
	var server, fserver usages
	for round := range b.rounds {
		push := func(to, host, ratio *durations, parts *breakdown, server *usages, opts ...string) func() error {
			return func() error {
				if err := b.settle(ctx, 1); err != nil {
					return err
				}
				if len(opts) > 0 { // a build anew links, so the reference has to
					if err := os.Remove(c.binary()); err != nil {
						return err
					}
				}
				h, _, err := c.hostBuild(ctx, nil)
				if err != nil {
					return err
				}
				if err := c.commit(ctx); err != nil {
					return err
				}
				p, err := c.measurePush(ctx, "", opts...)
				if err != nil {
					return err
				}
				host.add(h)
				to.add(p.wall)
				ratio.add(quotient(p.wall, h))
				parts.add(spans(p.lines, p.wall))
				server.add(p.server)
				return nil
			}
		}
		if err := inTurns(round, push(&plain, &host, &ratio, &parts, &server), push(&forced, &linked, &fratio, &fparts, &fserver, "-o", "force-rebuild")); err != nil {
			return err
		}
		b.say("unchanged: %s, with force-rebuild %s", secs(plain.last()), secs(forced.last()))
	}
	sec.add(row{What: "push of an empty commit", Budget: "≤ 1 s", Measured: plain.text(), Reference: "go build, nothing changed, " + host.text(),
		Ratio: times(ratio.median()), Met: verdict(plain.median() <= time.Second)})
	sec.add(row{What: "the same with `-o force-rebuild`", Budget: "≤ 1 s", Measured: forced.text(), Reference: "go build, linking anew, " + linked.text(),
		Ratio: times(fratio.median()), Met: verdict(forced.median() <= time.Second)})
	t, ft := parts.table("Empty commit: where the time goes"), fparts.table("With force-rebuild: where the time goes")
	server.rows(&t)
	fserver.rows(&ft)
	sec.tables = append(sec.tables, t, ft)
	sec.note("hello-http with a new, empty commit. The clock stops when `git push` has ended: by then the release is live and its new instance has answered.")
	return b.destroy(ctx, c.app)
}
