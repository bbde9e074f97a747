package router

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// respHead is what a response head says about framing and the connection.
type respHead struct {
	status  int
	length  int64 // of the body; -1 when not given
	chunked bool
	close   bool   // the app will close, or is HTTP/1.0
	upgrade string // protocol of a 101
}

var errHeadSize = errors.New("its head is larger than the limit")

// errHead is a response that is not HTTP, or not safe to frame anew.
type errHead string

func (e errHead) Error() string { return "its answer is not valid HTTP: " + string(e) }

// readLine gives the next line without its end, and takes its bytes off left.
// The slice is valid until the next read.
func readLine(br *bufio.Reader, left *int) ([]byte, error) {
	line, err := br.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		long := bytes.Clone(line)
		for errors.Is(err, bufio.ErrBufferFull) && len(long) <= *left {
			line, err = br.ReadSlice('\n')
			long = append(long, line...)
		}
		line = long
	}
	if *left -= len(line); *left < 0 {
		return nil, errHeadSize
	}
	if err != nil {
		if errors.Is(err, io.EOF) && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	line = line[:len(line)-1]
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	return line, nil
}

// readHead reads one response head of at most limit bytes into h, without the
// headers that concern only this connection. io.EOF means not one byte came.
func readHead(br *bufio.Reader, limit int, h http.Header, head *respHead) error {
	*head = respHead{length: -1}
	left := limit
	line, err := readLine(br, &left)
	if err != nil {
		return err
	}
	if err := head.statusLine(line); err != nil {
		return err
	}
	var named []string
	values := make([]string, 8) // one allocation for most heads
	for {
		line, err := readLine(br, &left)
		if errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
		if len(line) == 0 {
			break
		}
		k, v, err := splitHeader(line)
		if err != nil {
			return err
		}
		switch k {
		case "Content-Length":
			n, err := strconv.ParseUint(v, 10, 62)
			if err != nil || v[0] == '+' {
				return errHead("bad Content-Length")
			}
			if head.length >= 0 && head.length != int64(n) {
				return errHead("two Content-Lengths")
			}
			if head.length >= 0 {
				continue
			}
			head.length = int64(n)
		case "Transfer-Encoding":
			if head.chunked || !strings.EqualFold(v, "chunked") {
				return errHead("a Transfer-Encoding other than chunked")
			}
			head.chunked = true
			continue
		case "Connection":
			for t := range strings.SplitSeq(v, ",") {
				t = textproto.CanonicalMIMEHeaderKey(strings.TrimSpace(t))
				if t == "Close" {
					head.close = true
				} else if t != "" {
					named = append(named, t)
				}
			}
			continue
		case "Upgrade":
			head.upgrade = v
			continue
		case "Keep-Alive", "Proxy-Connection":
			continue
		}
		if old, ok := h[k]; ok {
			h[k] = append(old, v)
			continue
		}
		if len(values) == 0 {
			values = make([]string, 8)
		}
		values[0] = v
		h[k], values = values[:1:1], values[1:]
	}
	if head.chunked && head.length >= 0 {
		return errHead("both Content-Length and Transfer-Encoding")
	}
	for _, n := range named {
		if n != "Content-Length" { // framing is not the app's to hide
			delete(h, n)
		}
	}
	return nil
}

func (head *respHead) statusLine(line []byte) error {
	const prefix = "HTTP/1."
	if len(line) < 12 || string(line[:len(prefix)]) != prefix || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return errHead("bad status line")
	}
	switch line[7] {
	case '0':
		head.close = true
	case '1':
	default:
		return errHead("bad version")
	}
	for _, c := range line[9:12] {
		if c < '0' || c > '9' {
			return errHead("bad status code")
		}
		head.status = head.status*10 + int(c-'0')
	}
	if head.status < 100 {
		return errHead("bad status code")
	}
	return nil
}

// splitHeader parses one header line. Folded lines, space before the colon and
// control characters are refused.
func splitHeader(line []byte) (k, v string, err error) {
	i := bytes.IndexByte(line, ':')
	if i <= 0 {
		return "", "", errHead("a header line without a name")
	}
	for _, c := range line[:i] {
		if !httpguts.IsTokenRune(rune(c)) {
			return "", "", errHead("bad header name")
		}
	}
	val := bytes.Trim(line[i+1:], " \t")
	for _, c := range val {
		if c < ' ' && c != '\t' || c == 0x7f {
			return "", "", errHead("a control character in a header")
		}
	}
	return textproto.CanonicalMIMEHeaderKey(string(line[:i])), string(val), nil
}

// readTrailer reads the trailer lines after a chunked body.
func readTrailer(br *bufio.Reader, limit int) (http.Header, error) {
	var h http.Header
	for left := limit; ; {
		line, err := readLine(br, &left)
		if errors.Is(err, io.EOF) {
			return nil, io.ErrUnexpectedEOF
		} else if err != nil {
			return nil, err
		}
		if len(line) == 0 {
			return h, nil
		}
		k, v, err := splitHeader(line)
		if err != nil {
			return nil, fmt.Errorf("read trailer: %w", err)
		}
		if !httpguts.ValidTrailerHeader(k) {
			continue
		}
		if h == nil {
			h = http.Header{}
		}
		h[k] = append(h[k], v)
	}
}
