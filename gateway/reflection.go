package gateway

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"google.golang.org/grpc/codes"
	reflectv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/m3o/m3o"
)

const (
	reflectionPrefix = "/grpc.reflection."
	reflectionV1     = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
	reflectionAlpha  = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
)

// reflects says that the gateway answers a reflection call: the app has a
// schema and not that version of the service.
func (g *Gateway) reflects(api *m3o.API, path string) bool {
	if path != reflectionV1 && path != reflectionAlpha || api.Schema == "" {
		return false
	}
	s, err := g.schemas.load(api.Schema, api.Strict)
	return err == nil && s.methods[path] == nil
}

// serveReflection answers gRPC's server reflection from the schema. The
// messages of both versions are the same but for their package.
func (g *Gateway) serveReflection(w http.ResponseWriter, r *http.Request, api *m3o.API) {
	h := w.Header()
	h.Set("Content-Type", "application/grpc")
	s, err := g.schema(api)
	if err == nil {
		rc := http.NewResponseController(w)
		w.WriteHeader(http.StatusOK)
		_ = rc.Flush()
		for err == nil {
			var flags byte
			var msg []byte
			if flags, msg, err = readFrame(r.Body, 1<<20); err != nil {
				if errors.Is(err, io.EOF) {
					err = nil
					break
				}
				err = invalid("the request ends within a message")
				break
			}
			if flags&flagCompressed != 0 {
				if encodingOf(r.Header.Get("Grpc-Encoding")) != "gzip" {
					err = &problem{grpc: codes.Unimplemented, detail: "this encoding is not understood: use gzip or identity"}
					break
				}
				if msg, err = gunzip(msg, 1<<20); err != nil {
					err = unzipError(err, 1<<20)
					break
				}
			}
			var q reflectv1.ServerReflectionRequest
			if proto.Unmarshal(msg, &q) != nil {
				err = invalid("the request is no ServerReflectionRequest")
				break
			}
			var out []byte
			if out, err = proto.Marshal(s.reflect(&q)); err != nil {
				break
			}
			if _, werr := w.Write(appendFrame(nil, 0, out)); werr != nil {
				return // the client is gone
			}
			_ = rc.Flush()
		}
	}
	var p *problem
	if err != nil {
		p = problemOf(err)
		h.Set(http.TrailerPrefix+"Grpc-Message", encodeMessage(p.detail))
	}
	h.Set(http.TrailerPrefix+"Grpc-Status", strconv.Itoa(int(p.code())))
}

// reflect answers one question.
func (s *set) reflect(q *reflectv1.ServerReflectionRequest) *reflectv1.ServerReflectionResponse {
	a := &reflectv1.ServerReflectionResponse{ValidHost: q.Host, OriginalRequest: q}
	missing := func(what string) *reflectv1.ServerReflectionResponse {
		a.MessageResponse = &reflectv1.ServerReflectionResponse_ErrorResponse{ErrorResponse: &reflectv1.ErrorResponse{
			ErrorCode: int32(codes.NotFound), ErrorMessage: fmt.Sprintf("the app's schema has no %.200s", what)}}
		return a
	}
	file := func(fd protoreflect.FileDescriptor) *reflectv1.ServerReflectionResponse {
		out := &reflectv1.FileDescriptorResponse{}
		seen := map[string]bool{}
		var add func(fd protoreflect.FileDescriptor)
		add = func(fd protoreflect.FileDescriptor) {
			if seen[fd.Path()] || fd.IsPlaceholder() {
				return
			}
			seen[fd.Path()] = true
			b, err := proto.Marshal(protodesc.ToFileDescriptorProto(fd))
			if err != nil {
				return // it was a message once
			}
			out.FileDescriptorProto = append(out.FileDescriptorProto, b)
			for i := range fd.Imports().Len() {
				add(fd.Imports().Get(i).FileDescriptor)
			}
		}
		add(fd)
		a.MessageResponse = &reflectv1.ServerReflectionResponse_FileDescriptorResponse{FileDescriptorResponse: out}
		return a
	}
	switch m := q.MessageRequest.(type) {
	case *reflectv1.ServerReflectionRequest_ListServices:
		list := &reflectv1.ListServiceResponse{}
		for _, name := range s.services() {
			list.Service = append(list.Service, &reflectv1.ServiceResponse{Name: name})
		}
		a.MessageResponse = &reflectv1.ServerReflectionResponse_ListServicesResponse{ListServicesResponse: list}
		return a
	case *reflectv1.ServerReflectionRequest_FileByFilename:
		fd, err := s.files.FindFileByPath(m.FileByFilename)
		if err != nil {
			return missing("file " + m.FileByFilename)
		}
		return file(fd)
	case *reflectv1.ServerReflectionRequest_FileContainingSymbol:
		d, err := s.files.FindDescriptorByName(protoreflect.FullName(m.FileContainingSymbol))
		if err != nil {
			return missing("symbol " + m.FileContainingSymbol)
		}
		return file(d.ParentFile())
	case *reflectv1.ServerReflectionRequest_FileContainingExtension:
		x := m.FileContainingExtension
		t, err := s.types.FindExtensionByNumber(protoreflect.FullName(x.GetContainingType()), protoreflect.FieldNumber(x.GetExtensionNumber()))
		if err != nil {
			return missing(fmt.Sprintf("extension %d of %s", x.GetExtensionNumber(), x.GetContainingType()))
		}
		return file(t.TypeDescriptor().ParentFile())
	case *reflectv1.ServerReflectionRequest_AllExtensionNumbersOfType:
		name := protoreflect.FullName(m.AllExtensionNumbersOfType)
		if _, err := s.files.FindDescriptorByName(name); err != nil {
			return missing("type " + string(name))
		}
		out := &reflectv1.ExtensionNumberResponse{BaseTypeName: string(name)}
		s.files.RangeFiles(func(fd protoreflect.FileDescriptor) bool {
			for i := range fd.Extensions().Len() {
				if x := fd.Extensions().Get(i); x.ContainingMessage().FullName() == name {
					out.ExtensionNumber = append(out.ExtensionNumber, int32(x.Number()))
				}
			}
			return true
		})
		a.MessageResponse = &reflectv1.ServerReflectionResponse_AllExtensionNumbersResponse{AllExtensionNumbersResponse: out}
		return a
	}
	return missing("answer to that")
}

// services are the names of the app's services, in order.
func (s *set) services() []string {
	var out []string
	for _, m := range s.list {
		if n := len(out); n == 0 || out[n-1] != m.service {
			out = append(out, m.service)
		}
	}
	return out
}
