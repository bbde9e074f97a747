package gateway

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/anypb"
)

// problem is an answer that is not the app's message. Its JSON form has the
// four fields M3O's clients know.
type problem struct {
	http    int
	grpc    codes.Code
	detail  string
	err     error            // for the log only
	allow   string           // the verbs of a 405, POST when empty
	own     bool             // the app said so itself
	text    bool             // told as plain text
	bare    bool             // Connect tells it by the HTTP code alone
	status  []byte           // the app's google.rpc.Status, on the wire
	details []*anypb.Any     // of it
	types   *dynamicpb.Types // that know the details
}

// code is the gRPC status: OK for nil.
func (p *problem) code() codes.Code {
	if p == nil {
		return codes.OK
	}
	return p.grpc
}

func (p *problem) Error() string { return p.detail }
func (p *problem) Unwrap() error { return p.err }

// problemOf is err as a problem: one of ours as it is, any other the gateway's own fault.
func problemOf(err error) *problem {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	return &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: "the app's answer makes no sense: " + err.Error(), err: err}
}

func (p *problem) json(app string) []byte {
	if app == "" {
		app = "m3o"
	}
	text := p.detail
	if text == "" {
		text = p.grpc.String()
	}
	var details []json.RawMessage
	for _, d := range p.details {
		details = append(details, marshal(struct {
			Type  string          `json:"@type"`
			Value json.RawMessage `json:"value,omitempty"`
			Bytes []byte          `json:"bytes,omitempty"`
		}{d.TypeUrl, detailJSON(d, p.types), d.Value}))
	}
	return marshal(struct {
		ID      string            `json:"id"`
		Code    int               `json:"code"`
		Detail  string            `json:"detail"`
		Status  string            `json:"status"`
		Details []json.RawMessage `json:"details,omitempty"`
	}{app, p.http, text, statusText(p.http), details})
}

func statusText(code int) string {
	if code == statusClientClosed {
		return "Client Closed Request"
	}
	return http.StatusText(code)
}

func (p *problem) write(w http.ResponseWriter, r *http.Request, app string) {
	h := w.Header()
	clear(h)
	body := append(p.json(app), '\n')
	h.Set("Content-Type", "application/json")
	if p.text {
		// Clients of Connect take any JSON for their own error object.
		body = append([]byte(p.detail), '\n')
		h.Set("Content-Type", "text/plain; charset=utf-8")
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	switch p.http {
	case http.StatusMethodNotAllowed:
		h.Set("Allow", cmp.Or(p.allow, http.MethodPost))
	case http.StatusServiceUnavailable:
		h.Set("Retry-After", "1")
	}
	w.WriteHeader(p.http)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client is gone: nobody left to tell
	}
}

// statusClientClosed is nginx's code for a call its caller cancelled.
const statusClientClosed = 499

// httpStatus is the HTTP code of a gRPC status, as google.rpc.Code documents
// it; FAILED_PRECONDITION and OUT_OF_RANGE are the caller's fault.
func httpStatus(c codes.Code) int {
	switch c {
	case codes.OK:
		return http.StatusOK
	case codes.Canceled:
		return statusClientClosed
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return http.StatusBadRequest
	case codes.DeadlineExceeded:
		return http.StatusGatewayTimeout
	case codes.NotFound:
		return http.StatusNotFound
	case codes.AlreadyExists, codes.Aborted:
		return http.StatusConflict
	case codes.PermissionDenied:
		return http.StatusForbidden
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	case codes.Unimplemented:
		return http.StatusNotImplemented
	case codes.Unavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// codeOfHTTP is the gRPC status of an answer that is no gRPC at all, after
// http-grpc-status-mapping.md of the gRPC project.
func codeOfHTTP(status int) codes.Code {
	switch status {
	case http.StatusBadRequest:
		return codes.Internal
	case http.StatusUnauthorized:
		return codes.Unauthenticated
	case http.StatusForbidden:
		return codes.PermissionDenied
	case http.StatusNotFound:
		return codes.Unimplemented
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return codes.Unavailable
	}
	return codes.Unknown
}

// decodeMessage decodes grpc-message: %XX stands for a byte; what is not such
// a triple stands for itself, and what is not UTF-8 in the end is replaced.
func decodeMessage(s string) string {
	if strings.IndexByte(s, '%') >= 0 {
		b := make([]byte, 0, len(s))
		for i := 0; i < len(s); i++ {
			if s[i] == '%' && i+2 < len(s) {
				if v, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
					b = append(b, byte(v))
					i += 2
					continue
				}
			}
			b = append(b, s[i])
		}
		s = string(b)
	}
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// encodeMessage encodes grpc-message as the gRPC over HTTP/2 spec says.
func encodeMessage(s string) string {
	plain := true
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			plain = false
			break
		}
	}
	if plain {
		return s
	}
	const hex = "0123456789ABCDEF"
	b := make([]byte, 0, len(s)+16)
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			b = append(b, '%', hex[c>>4], hex[c&15])
		} else {
			b = append(b, c)
		}
	}
	return string(b)
}

// validBin checks one header line of binary metadata: base64 values, padded
// or not, separated by commas.
func validBin(v string) bool {
	for part := range strings.SplitSeq(v, ",") {
		part = strings.TrimRight(strings.TrimSpace(part), "=")
		if _, err := base64.RawStdEncoding.DecodeString(part); err != nil {
			return false
		}
	}
	return true
}
