package daemon

import (
	"context"
	"slices"

	"github.com/m3o/m3o"
)

// prune removes the images and layers of releases that no rollback offers. It
// is the only owner of retention. While a push is on its way it does nothing:
// the next deploy calls it again.
func (d *Daemon) prune(ctx context.Context) {
	if !d.imagesMu.TryLock() {
		return
	}
	defer d.imagesMu.Unlock()
	apps, err := d.ledger.Apps(ctx)
	if err != nil {
		d.log.Error("prune images", "err", err)
		return
	}
	var all []m3o.Release
	// What still runs reads its files from its layers, whatever the ledger keeps.
	keep := append(d.driver.Images(), d.runs.inUse()...)
	for _, app := range apps {
		kept, err := d.ledger.Kept(ctx, app.Name)
		if err != nil {
			d.log.Error("prune images", "app", app.Name, "err", err)
			return
		}
		held, err := d.ledger.Held(ctx, app.Name)
		if err != nil {
			d.log.Error("prune images", "app", app.Name, "err", err)
			return
		}
		for _, rel := range slices.Concat(kept, held) {
			keep = append(keep, rel.Image)
		}
		all = append(all, kept...)
	}
	if err := d.pruneDescriptors(all, d.routes.schemas()); err != nil {
		d.log.Error("prune descriptors", "err", err)
	}
	// The driver first: what it unpacks is read from the images.
	if err := d.driver.Prune(ctx, keep); err != nil {
		d.log.Error("prune layers", "err", err)
	}
	if err := d.builder.Prune(ctx, keep); err != nil {
		d.log.Error("prune images", "err", err)
	}
}
