package router

import "hash/maphash"

// Alias serves the host as under another name too, one that no table may have:
// an address. Put forgets it.
func (rt *Router) Alias(name, as string) {
	l := rt.live.Load()
	shard := &l.hosts.shards[maphash.String(shardSeed, name)%shards]
	*shard = map[string]*host{name: l.hosts.get(as), as: l.hosts.get(as)}
}
