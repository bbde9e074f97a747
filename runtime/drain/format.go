package drain

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// jsonLine is one line as an HTTPS drain gets it, in an array.
type jsonLine struct {
	Time     time.Time `json:"time"`
	App      string    `json:"app"`
	Source   string    `json:"source"`
	Process  string    `json:"process,omitempty"`
	Instance string    `json:"instance,omitempty"`
	Release  string    `json:"release,omitempty"`
	Stream   string    `json:"stream,omitempty"`
	Text     string    `json:"text"`
}

func releaseName(n int) string {
	if n == 0 {
		return ""
	}
	return "v" + strconv.Itoa(n)
}

func encodeJSON(batch []Line) ([]byte, error) {
	out := make([]jsonLine, len(batch))
	for i, l := range batch {
		out[i] = jsonLine{l.Time.UTC(), l.App, l.Source, l.Process, l.Instance, releaseName(l.Release), l.Stream, l.Text}
	}
	return json.Marshal(out)
}

// The JSON encoding of OTLP's ExportLogsServiceRequest; see
// https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding.
type (
	otlpRequest struct {
		ResourceLogs []otlpResource `json:"resourceLogs"`
	}
	otlpResource struct {
		Resource  otlpAttributes `json:"resource"`
		ScopeLogs []otlpScope    `json:"scopeLogs"`
	}
	otlpAttributes struct {
		Attributes []otlpAttribute `json:"attributes"`
	}
	otlpScope struct {
		Scope struct {
			Name string `json:"name"`
		} `json:"scope"`
		LogRecords []otlpRecord `json:"logRecords"`
	}
	otlpRecord struct {
		TimeUnixNano         string          `json:"timeUnixNano"`
		ObservedTimeUnixNano string          `json:"observedTimeUnixNano"`
		SeverityNumber       int             `json:"severityNumber,omitempty"`
		SeverityText         string          `json:"severityText,omitempty"`
		Body                 otlpValue       `json:"body"`
		Attributes           []otlpAttribute `json:"attributes,omitempty"`
	}
	otlpAttribute struct {
		Key   string    `json:"key"`
		Value otlpValue `json:"value"`
	}
	otlpValue struct {
		StringValue string `json:"stringValue"`
	}
)

func attributes(pairs ...string) (out []otlpAttribute) {
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			out = append(out, otlpAttribute{pairs[i], otlpValue{pairs[i+1]}})
		}
	}
	return out
}

// encodeOTLP gives each instance a resource of its own, as the semantic
// conventions for services ask.
func encodeOTLP(batch []Line) ([]byte, error) {
	type who struct {
		app, source, process, instance string
		release                        int
	}
	at := map[who]int{}
	var req otlpRequest
	for _, l := range batch {
		w := who{l.App, l.Source, l.Process, l.Instance, l.Release}
		i, ok := at[w]
		if !ok {
			i = len(req.ResourceLogs)
			at[w] = i
			r := otlpResource{ScopeLogs: make([]otlpScope, 1)}
			r.Resource.Attributes = attributes("service.name", l.App, "service.version", releaseName(l.Release), "service.instance.id", l.Instance,
				"m3o.source", l.Source, "m3o.process", l.Process)
			r.ScopeLogs[0].Scope.Name = "m3o"
			req.ResourceLogs = append(req.ResourceLogs, r)
		}
		stamp := strconv.FormatInt(l.Time.UnixNano(), 10)
		rec := otlpRecord{TimeUnixNano: stamp, ObservedTimeUnixNano: stamp, Body: otlpValue{strings.ToValidUTF8(l.Text, "\ufffd")},
			Attributes: attributes("log.iostream", l.Stream)}
		s := &req.ResourceLogs[i].ScopeLogs[0]
		s.LogRecords = append(s.LogRecords, rec)
	}
	return json.Marshal(req)
}

// syslogSink keeps one connection.
type syslogSink struct {
	addr    string
	tls     *tls.Config
	timeout time.Duration
	conn    net.Conn
}

func (s *syslogSink) send(ctx context.Context, batch []Line) error {
	fresh := s.conn == nil
	if fresh {
		d := &tls.Dialer{NetDialer: &net.Dialer{Timeout: s.timeout}, Config: s.tls}
		c, err := d.DialContext(ctx, "tcp", s.addr)
		if err != nil {
			return err
		}
		s.conn = c
	}
	var b bytes.Buffer
	for _, l := range batch {
		b.Write(frame(l))
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(s.timeout)
	}
	err := s.conn.SetDeadline(deadline)
	if err == nil && !fresh {
		err = s.alive()
	}
	if err == nil {
		_, err = s.conn.Write(b.Bytes())
	}
	if err != nil {
		s.close()
	}
	return err
}

// alive finds out whether the server has closed the connection: a write to it
// would still go well, and its lines be lost. A syslog server never speaks.
func (s *syslogSink) alive() error {
	if err := s.conn.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		return err
	}
	_, err := s.conn.Read(make([]byte, 1))
	if ne, ok := err.(net.Error); ok && ne.Timeout() { //nolint:errorlint // of crypto/tls, not wrapped
		return nil
	}
	if err == nil {
		err = fmt.Errorf("the syslog server said something")
	}
	return err
}

func (s *syslogSink) close() {
	if s.conn != nil {
		_ = s.conn.Close()
		s.conn = nil
	}
}

// maxSyslog is the largest message a receiver should take, RFC 5424 §6.1, with
// much to spare for our longest line.
const maxSyslog = 32 << 10

// frame is a line as RFC 5424 has it, with its length before it (RFC 6587,
// octet counting; RFC 5425 asks for it over TLS):
//
//	<14>1 2026-05-04T11:59:00.123456Z hello app web hello-web-v3-x7k2q9 - text
func frame(l Line) []byte {
	pri := 14 // facility user, severity informational
	if l.Stream == "stderr" {
		pri = 12 // warning
	}
	text := strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return ' '
		}
		return r
	}, l.Text), "\ufffd")
	msg := fmt.Sprintf("<%d>1 %s %s %s %s %s - %s", pri, l.Time.UTC().Format("2006-01-02T15:04:05.000000Z"),
		word(l.App, 255), word(cmp.Or(l.Process, l.Source), 48), word(l.Source, 128), word(l.Instance, 32), text)
	if len(msg) > maxSyslog {
		msg = strings.ToValidUTF8(msg[:maxSyslog], "")
	}
	return []byte(strconv.Itoa(len(msg)) + " " + msg)
}

// word is a header field: printable ASCII, "-" when there is none.
func word(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, s)
	if len(s) > limit {
		s = s[len(s)-limit:] // instances differ at the end
	}
	if s == "" {
		return "-"
	}
	return s
}
