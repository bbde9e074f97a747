package source

import (
	"container/list"
	"sync"
)

// maxCached bounds a Cache, in entries: about 100 bytes each with their names.
const maxCached = 500_000

// A Cache remembers directory listings by tree hash, so that a push that
// changes one file reads a few trees only. It drops the least recently used
// beyond half a million entries. The zero Cache is ready to use and safe for
// concurrent use by all pushes of all apps: equal hashes are equal content.
type Cache struct {
	mu    sync.Mutex // guards the rest
	byKey map[[20]byte]*list.Element
	order *list.List // front: used last
	size  int        // entries held
	max   int        // 0: maxCached
}

// A listing is one directory. It is never changed once made.
type listing struct {
	entries    []entry
	submodules []string
}

func (l listing) cost() int { return 1 + len(l.entries) + len(l.submodules) }

type cached struct {
	key [20]byte
	listing
}

func (c *Cache) get(h [20]byte) (listing, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.byKey[h]
	if !ok {
		return listing{}, false
	}
	c.order.MoveToFront(el)
	return el.Value.(cached).listing, true
}

func (c *Cache) put(h [20]byte, l listing) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey == nil {
		c.byKey, c.order = map[[20]byte]*list.Element{}, list.New()
	}
	if _, ok := c.byKey[h]; ok {
		return
	}
	c.byKey[h] = c.order.PushFront(cached{h, l})
	c.size += l.cost()
	limit := c.max
	if limit == 0 {
		limit = maxCached
	}
	for c.size > limit && c.order.Len() > 1 {
		old := c.order.Remove(c.order.Back()).(cached)
		delete(c.byKey, old.key)
		c.size -= old.cost()
	}
}
