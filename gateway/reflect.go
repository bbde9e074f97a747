package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	reflectv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o"
)

const (
	maxServices = 1000
	maxFiles    = 2000
)

// Reflect asks the gRPC server at addr ("ip:port" or "unix:/path") for the
// schema of every service it registered, and of no other: grpc.reflection.v1, then v1alpha. It
// is NotFound when the server has no reflection, Invalid when the schema is
// larger than 16 MB or makes no sense. ctx bounds the time.
func Reflect(ctx context.Context, addr string) (*descriptorpb.FileDescriptorSet, error) {
	target := addr
	if !strings.HasPrefix(addr, "unix:") {
		target = "passthrough:///" + addr
	}
	cc, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxSchema)))
	if err != nil {
		return nil, fmt.Errorf("reflect %s: %w", addr, err)
	}
	defer cc.Close() //nolint:errcheck // nothing is in flight
	// The messages of both versions are the same but for their package.
	for _, version := range []string{"v1", "v1alpha"} {
		fds, err := reflectBy(ctx, cc, "/grpc.reflection."+version+".ServerReflection/ServerReflectionInfo")
		if status.Code(err) == codes.Unimplemented {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reflect %s: %w", addr, err)
		}
		if _, err := compile(fds, false); err != nil {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the app's gRPC reflection describes no valid schema", Err: err}
		}
		return fds, nil
	}
	return nil, &m3o.Error{Kind: m3o.NotFound, Msg: "the app's gRPC server has no reflection", Hint: "call reflection.Register(server) to get JSON"}
}

func reflectBy(ctx context.Context, cc *grpc.ClientConn, method string) (*descriptorpb.FileDescriptorSet, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cs, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return nil, err
	}
	ask := func(q *reflectv1.ServerReflectionRequest) (*reflectv1.ServerReflectionResponse, error) {
		if err := cs.SendMsg(q); err != nil && !errors.Is(err, io.EOF) { // after EOF RecvMsg has the status
			return nil, err
		}
		var a reflectv1.ServerReflectionResponse
		if err := cs.RecvMsg(&a); err != nil {
			return nil, err
		}
		if e := a.GetErrorResponse(); e != nil {
			return nil, errAnswer{e.ErrorCode, e.ErrorMessage}
		}
		return &a, nil
	}
	a, err := ask(&reflectv1.ServerReflectionRequest{MessageRequest: &reflectv1.ServerReflectionRequest_ListServices{}})
	if err != nil {
		return nil, err
	}
	services := a.GetListServicesResponse().GetService()
	if len(services) > maxServices {
		return nil, m3o.Errorf(m3o.Invalid, "the app has more than %d services", maxServices)
	}
	fds := &descriptorpb.FileDescriptorSet{}
	have := map[string]bool{}
	size := 0
	var missing []string
	take := func(a *reflectv1.ServerReflectionResponse) error {
		for _, b := range a.GetFileDescriptorResponse().GetFileDescriptorProto() {
			var fd descriptorpb.FileDescriptorProto
			if err := proto.Unmarshal(b, &fd); err != nil {
				return m3o.Errorf(m3o.Invalid, "the app's gRPC reflection sent a broken file: %w", err)
			}
			if have[fd.GetName()] {
				continue
			}
			have[fd.GetName()] = true
			if size += len(b); size > maxSchema || len(fds.File) >= maxFiles {
				return m3o.Errorf(m3o.Invalid, "the app's schema is larger than %d bytes or %d files", maxSchema, maxFiles)
			}
			fds.File = append(fds.File, &fd)
			missing = append(missing, fd.GetDependency()...)
		}
		return nil
	}
	registered := map[string]bool{}
	for _, s := range services {
		registered[s.Name] = true
		a, err := ask(&reflectv1.ServerReflectionRequest{MessageRequest: &reflectv1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: s.Name}})
		if _, refused := errors.AsType[errAnswer](err); refused {
			continue // registered, but its file is not linked in: the others still work
		} else if err != nil {
			return nil, err
		}
		if err := take(a); err != nil {
			return nil, err
		}
	}
	for len(missing) > 0 {
		name := missing[0]
		missing = missing[1:]
		if have[name] {
			continue
		}
		a, err := ask(&reflectv1.ServerReflectionRequest{MessageRequest: &reflectv1.ServerReflectionRequest_FileByFilename{FileByFilename: name}})
		if _, refused := errors.AsType[errAnswer](err); refused {
			have[name] = true // compile tolerates the gap
			continue
		} else if err != nil {
			return nil, err
		}
		if err := take(a); err != nil {
			return nil, err
		}
		have[name] = true
	}
	// A file may define services that this server does not have.
	for _, fd := range fds.File {
		fd.Service = slices.DeleteFunc(fd.Service, func(sd *descriptorpb.ServiceDescriptorProto) bool {
			full := protoreflect.FullName(fd.GetPackage()).Append(protoreflect.Name(sd.GetName()))
			return !registered[string(full)]
		})
	}
	return fds, nil
}

// errAnswer is an error inside an answer: the stream goes on.
type errAnswer struct {
	code int32
	msg  string
}

func (e errAnswer) Error() string { return fmt.Sprintf("reflection error %d: %s", e.code, e.msg) }
