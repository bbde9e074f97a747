package daemon

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// checkWords say what of an instance is checked, for the pusher.
func checkWords(h m3o.Health, t traits) string {
	kind := h.Kind
	if kind == "" {
		kind = t.Protocol
	}
	what := kindWords(kind, h.Path, h.Service)
	if h.Period > 0 || h.Failures > 0 {
		what += fmt.Sprintf(" every %v, out after %d failures", cmp.Or(h.Period, 5*time.Second), cmp.Or(h.Failures, 3))
	}
	if l := h.Liveness; l.Kind != "" {
		what += fmt.Sprintf("; restarted after %d failures of %s", cmp.Or(l.Failures, 3), kindWords(l.Kind, l.Path, l.Service))
	}
	return what
}

func kindWords(kind, path, service string) string {
	switch kind {
	case "http":
		return "HTTP " + cmp.Or(path, "/")
	case "grpc":
		return strings.TrimSpace("gRPC " + service)
	case "http1":
		return "HTTP"
	}
	return strings.ToUpper(kind)
}
