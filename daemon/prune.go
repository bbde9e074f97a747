package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/m3o/m3o"
)

// pruned is when prune was last done, and why it was not.
type pruned struct {
	mu  sync.Mutex // guards what follows
	at  time.Time
	err error
}

func (p *pruned) note(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err = err; err == nil {
		p.at = time.Now()
	}
}

func (p *pruned) last() (time.Time, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.at, p.err
}

// prune removes the images and layers of releases that no rollback offers. It
// is the only owner of retention. While a push is on its way it does nothing:
// the next call, after a deploy or an hour, does it.
func (d *Daemon) prune(ctx context.Context) {
	if !d.imagesMu.TryLock() {
		return
	}
	defer d.imagesMu.Unlock()
	err := d.pruneAll(ctx)
	if ctx.Err() != nil {
		return // the daemon stops
	}
	if err != nil {
		d.log.Error("prune images", "err", err)
	}
	d.pruned.note(err)
}

func (d *Daemon) pruneAll(ctx context.Context) error {
	apps, err := d.ledger.Apps(ctx)
	if err != nil {
		return err
	}
	var all []m3o.Release
	// What still runs reads its files from its layers, whatever the ledger keeps.
	keep := append(d.driver.Images(), d.runs.inUse()...)
	for _, app := range apps {
		kept, err := d.ledger.Kept(ctx, app.Name)
		if err != nil {
			return fmt.Errorf("releases of %s: %w", app.Name, err)
		}
		held, err := d.ledger.Held(ctx, app.Name)
		if err != nil {
			return fmt.Errorf("releases of %s: %w", app.Name, err)
		}
		for _, rel := range slices.Concat(kept, held) {
			keep = append(keep, rel.Image)
		}
		all = append(all, kept...)
	}
	// The driver before the builder: what it unpacks is read from the images.
	return errors.Join(d.pruneDescriptors(all, d.routes.schemas()), d.driver.Prune(ctx, keep), d.builder.Prune(ctx, keep))
}
