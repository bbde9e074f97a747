package gateway

import (
	"net/http"
	"strings"

	"github.com/m3o/m3o"
)

const reflectionPrefix = "/grpc.reflection."

func (g *Gateway) reflects(api *m3o.API, path string) bool { return false }

var _ = strings.Cut
var _ http.Handler
